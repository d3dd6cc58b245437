"""Proxy-KD, as recipes, runs and reports see it."""

from ..proxy.method import ProxyMethod


class ProxyKD(ProxyMethod):
    """Distillation from a proxy that was aligned with the teacher."""

    name = "Proxy-KD"
    config = "trl_bbkd.proxykd.config:ProxyKDConfig"
    trainer_type = "trl_bbkd.proxykd.trainer:ProxyKDTrainer"
    report = "trl_bbkd.proxykd.report:ProxyKDReport"


METHOD = ProxyKD()
