"""The last counter word of each use, so that uses with one seed and offset stay independent."""

RANDOM_START = 0x1F0A_11CE
RANDOM_START_RADIUS = 0x2B7E_1516
CROP_FLIP = 0x3C6E_F372
