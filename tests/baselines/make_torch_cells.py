"""Writes torch_cells.npz: outputs and gradients of nn.RNN, nn.LSTM and nn.GRU of PyTorch on given
weights.

Run it with a Python that has torch: python tests/baselines/make_torch_cells.py
"""

import pathlib

import numpy as np
import torch

B, T, IN, D, LAYERS = 2, 7, 4, 5, 2


def main():
    values = {}
    for kind, module in (("rnn", torch.nn.RNN), ("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)):
        torch.manual_seed(0)
        network = module(IN, D, LAYERS, batch_first=True)
        x = torch.randn(B, T, IN, requires_grad=True)
        weight = torch.randn(B, T, D)
        out, last = network(x)
        (out * weight).sum().backward()
        values |= {f"{kind}/x": x, f"{kind}/weight": weight, f"{kind}/out": out, f"{kind}/x_gradient": x.grad}
        for index, state in enumerate(last if isinstance(last, tuple) else (last,)):
            values[f"{kind}/last_{index}"] = state
        for name, parameter in network.named_parameters():
            values |= {f"{kind}/{name}": parameter, f"{kind}/{name}/gradient": parameter.grad}
    path = pathlib.Path(__file__).parent / "fixtures" / "torch_cells.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **{name: value.detach().numpy() for name, value in values.items()})
    print(path, path.stat().st_size, "bytes, torch", torch.__version__)


if __name__ == "__main__":
    main()
