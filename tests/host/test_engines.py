"""What engines send from process to process, and how."""

from unittest import mock

import torch
from torch import nn

from tests.processes import on_processes
from trl_bbkd.host.engines import broadcast


def weights_of_the_main_process() -> dict[str, torch.Tensor]:
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(torch.distributed.get_rank())
    model = nn.BatchNorm1d(4)
    nn.init.normal_(model.weight)
    model.running_mean.normal_()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    broadcast(model, torch.device("cpu"))
    return {"own": own, "given": model.state_dict()}


def test_every_process_gets_the_main_one_s_weights():
    main, other = on_processes(2, weights_of_the_main_process)
    for name in ("weight", "running_mean"):
        assert not torch.equal(main["own"][name], other["own"][name])
        assert torch.equal(main["own"][name], main["given"][name])
        assert torch.equal(main["own"][name], other["given"][name])


def test_what_is_sent_is_on_the_device_that_processes_talk_through(monkeypatch):
    """As under NCCL. There is no such device here: a parameter and what it is there are stand-ins."""
    sent = mock.Mock()
    monkeypatch.setattr("torch.distributed.broadcast", sent)
    module, device = mock.Mock(), torch.device("cuda", 0)
    parameter = mock.Mock()
    module.parameters.return_value, module.buffers.return_value = [parameter], []
    broadcast(module, device)
    parameter.data.to.assert_called_once_with(device)
    sent.assert_called_once_with(parameter.data.to.return_value, src=0)
    parameter.data.copy_.assert_called_once_with(parameter.data.to.return_value)
