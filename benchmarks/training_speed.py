"""A session step of sfl_jax against PyTorch, in pairs within one process: python -m benchmarks.training_speed

The peer is timm's EfficientNetV2 in PyTorch, clients one after the other, as rivals simulate them; on a GPU
both run there. Prints milliseconds per local step of all K clients, the median ratio of the pairs, and the
part of this machine's measured matrix-product ceiling that sfl_jax reaches. Needs the `benchmark` extra.
"""

import argparse
import enum
import functools
import importlib.machinery
import json
import statistics
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sfl_jax import models
from sfl_jax.federated.balance import fill_chunks
from sfl_jax.federated.round import Model, run_round
from sfl_jax.federated.session import Assignment, Samples, Training

CLASSES = 10


def sfl_jax_step(name, clients, batch, size, steps, clients_per_chunk):
    """A function that runs `steps` local steps of all clients, and its FLOP per local step of all clients."""
    chain = models.create(name, CLASSES, 1)
    rng = np.random.default_rng(0)
    variables = chain.init(jax.random.key(0), jnp.zeros((1, size, size, 1)))
    samples = Samples(
        jnp.asarray(rng.integers(0, 256, (1024, size, size, 1), np.uint8)),
        jnp.asarray(rng.integers(0, CLASSES, 1024).astype(np.int32)),
    )
    work = Assignment(
        np.arange(clients, dtype=np.int32),
        np.full(clients, len(chain) // 2, np.int32),
        np.ones(clients, np.float32),
        np.full(clients, steps, np.int32),
        rng.integers(0, 1024, (clients, steps, batch)).astype(np.int32),
    )
    work, chunk = fill_chunks(work, clients_per_chunk)
    training = Training(chain, optax.trace(0.9), lambda x: x.astype(jnp.float32) / 127.5 - 1)
    run = jax.jit(functools.partial(run_round, training, chunk, None))
    arguments = jax.device_put((Model(variables), samples, work, jax.random.key(1), np.float32(0.02)))
    profile = models.profile(chain, (size, size, 1))
    flop = 2 * clients * batch * int(profile.forward_macs.sum() + profile.backward_macs.sum())
    return lambda: jax.block_until_ready(run(*arguments)), flop


def pytorch_step(name, clients, batch, size, steps, channels_last):
    """The same work in PyTorch, clients one after the other, each with weights and momentum of its own."""
    torch, timm = import_timm()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def one_client():
        model = timm.create_model(
            name.replace("efficientnetv2-", "tf_efficientnetv2_"), num_classes=CLASSES, in_chans=1,
            drop_rate=0.2, drop_path_rate=0.2,
        )  # fmt: skip
        model = model.to(device, memory_format=layout).train()
        return model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    sessions = [one_client() for _ in range(clients)]
    images = torch.randn(batch, 1, size, size, device=device).to(memory_format=layout)
    labels = torch.randint(0, CLASSES, (batch,), device=device)

    def run():
        for model, optimizer in sessions:
            for _ in range(steps):
                optimizer.zero_grad(set_to_none=True)
                torch.nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def import_timm():
    """(torch, timm); timm imports torchvision for what is not used here, so empty modules stand in for it."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: it was built for another torch
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        for name in ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc", ".datasets"):
            module = types.ModuleType(f"torchvision{name}")
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
            module.__path__ = []
            module.__getattr__ = _anything  # type: ignore[method-assign]
            sys.modules[module.__name__] = module
            parent, _, child = module.__name__.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        modes = {
            mode.upper(): mode for mode in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
        }
        interpolation = enum.Enum("InterpolationMode", modes)
        for name in ("", ".functional"):
            sys.modules[f"torchvision.transforms{name}"].InterpolationMode = interpolation
    import timm
    import torch

    return torch, timm


def _anything(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def ceiling_flops(size=2048):
    """FLOP/s of a large float32 matrix product here, the best of several."""
    matrix = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(matrix, matrix))
    return (
        2 * size**3 / min(seconds(lambda: jax.block_until_ready(product(matrix, matrix))) for _ in range(10))
    )


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(name, clients, batch, size, steps, pairs, clients_per_chunk):
    """Milliseconds per step of each side, and the median over pairs of PyTorch's time over ours."""
    ours, flop = sfl_jax_step(name, clients, batch, size, steps, clients_per_chunk)
    rivals = {
        "channels_last": pytorch_step(name, clients, batch, size, steps, channels_last=True),
        "default": pytorch_step(name, clients, batch, size, steps, channels_last=False),
    }
    for run in (ours, *rivals.values()):
        run()
    times = [
        {"sfl_jax": seconds(ours)} | {k: seconds(run) for k, run in rivals.items()} for _ in range(pairs)
    ]
    row = {"model": name, "clients": clients, "batch": batch, "size": size}
    for side in times[0]:
        row[f"{side}_ms"] = round(1e3 * statistics.median(t[side] for t in times) / steps, 1)
    for rival in rivals:
        row[f"{rival}_over_sfl_jax"] = round(statistics.median(t[rival] / t["sfl_jax"] for t in times), 2)
    row["of_ceiling"] = round(flop * steps / min(t["sfl_jax"] for t in times) / ceiling_flops(), 3)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="b0")
    parser.add_argument("--clients", default="16")
    parser.add_argument("--batches", default="32")
    parser.add_argument("--sizes", default="32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--clients_per_chunk", type=int, default=4)
    options = parser.parse_args()
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, ceiling {ceiling_flops() / 1e9:.0f} GFLOP/s"
    )
    for name in options.models.split(","):
        for clients in map(int, options.clients.split(",")):
            for batch in map(int, options.batches.split(",")):
                for size in map(int, options.sizes.split(",")):
                    row = compare(
                        f"efficientnetv2-{name}", clients, batch, size, options.steps, options.pairs,
                        options.clients_per_chunk,
                    )  # fmt: skip
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
