"""The papers of the objectives, for model cards and for RobustBench's entries."""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    """A publication, in the fields of RobustBench's ``model_info``."""

    link: str
    name: str
    authors: str
    venue: str
    key: str


PAPERS = {
    "arat": Paper(
        "https://arxiv.org/abs/2402.14648",
        "Rethinking Invariance Regularization in Adversarial Training to Improve "
        "Robustness-Accuracy Trade-off",
        "Futa Waseda, Ching-Chun Chang, Isao Echizen",
        "ICLR 2025",
        "Waseda2025Rethinking",
    ),
    "at": Paper(
        "https://arxiv.org/abs/1706.06083",
        "Towards Deep Learning Models Resistant to Adversarial Attacks",
        "Aleksander Madry, Aleksandar Makelov, Ludwig Schmidt, Dimitris Tsipras, Adrian Vladu",
        "ICLR 2018",
        "Madry2018Towards",
    ),
    "trades": Paper(
        "https://arxiv.org/abs/1901.08573",
        "Theoretically Principled Trade-off between Robustness and Accuracy",
        "Hongyang Zhang, Yaodong Yu, Jiantao Jiao, Eric P. Xing, Laurent El Ghaoui, "
        "Michael I. Jordan",
        "ICML 2019",
        "Zhang2019Theoretically",
    ),
    "mart": Paper(
        "https://openreview.net/forum?id=rklOg6EFwS",
        "Improving Adversarial Robustness Requires Revisiting Misclassified Examples",
        "Yisen Wang, Difan Zou, Jinfeng Yi, James Bailey, Xingjun Ma, Quanquan Gu",
        "ICLR 2020",
        "Wang2020Improving",
    ),
    "lbgat": Paper(
        "https://arxiv.org/abs/2011.11164",
        "Learnable Boundary Guided Adversarial Training",
        "Jiequan Cui, Shu Liu, Liwei Wang, Jiaya Jia",
        "ICCV 2021",
        "Cui2021Learnable",
    ),
    "arrest": Paper(
        "https://arxiv.org/abs/2308.16454",
        "Adversarial Finetuning with Latent Representation Constraint to Mitigate "
        "Accuracy-Robustness Tradeoff",
        "Satoshi Suzuki, Shin'ya Yamaguchi, Shoichiro Takeda, Sekitoshi Kanai, Naoki Makishima, "
        "Atsushi Ando, Ryo Masumura",
        "ICCV 2023",
        "Suzuki2023Adversarial",
    ),
}
"""By the name of the objective; ordinary training and objectives of one's own have none."""
