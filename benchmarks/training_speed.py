"""Local training of sfl_jax against PyTorch, in pairs within one process: python -m benchmarks.training_speed

Peers: timm's EfficientNetV2 in PyTorch, for resnet18 and cnn `torch_networks`, clients one after the other,
as rivals simulate them, in its default layout, in channels_last and, with --torch_compile, compiled; with
--lax_conv also the same network through `lax.conv`, vmapped, as plain Flax would compute it. On a GPU all of
them run there.

Our side is computed as `launch.train` would choose by measurement, or with --clients_per_chunk as products.
Prints a table, and with --json keeps it: milliseconds per local step of all K clients, of a whole round of
`--steps` with its aggregation and of the steps alone; the median over pairs of a peer's time over that of the
round; the part of this machine's measured matrix-product ceiling that the step reaches. Needs the `benchmark`
extra.
"""

import argparse
import enum
import functools
import importlib.machinery
import itertools
import json
import pathlib
import statistics
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np

from sfl_jax import models
from sfl_jax.federated import execution, optimizers
from sfl_jax.federated.balance import fill_chunks, places_per_client
from sfl_jax.federated.round import Model, run_round
from sfl_jax.federated.session import Assignment, Samples, Training
from sfl_jax.models.layers import FORMS
from sfl_jax.registry import NETWORKS

CLASSES = 10


def sfl_jax_round(name, clients, batch, size, steps, clients_per_chunk, layer_form="product"):
    """(a function that runs a round of so many local steps, at most `steps`; the FLOP of such a step)."""
    chain = models.create(name, CLASSES, 1, layer_form=layer_form)
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
    training = Training(chain, optimizers.sgd(0.9), lambda x: x.astype(jnp.float32) / 127.5 - 1)
    run = jax.jit(functools.partial(run_round, training, chunk, None))
    rest = jax.device_put((jax.random.key(1), np.float32(0.02)))
    model, samples, work = jax.device_put((Model.of(variables), samples, work))
    profile = models.profile(chain, (size, size, 1))
    flop = 2 * clients * batch * int(profile.forward_macs.sum() + profile.backward_macs.sum())

    def run_steps(count):
        jax.block_until_ready(run(model, samples, work._replace(steps=jnp.minimum(work.steps, count)), *rest))

    return run_steps, flop


def pytorch_steps(name, clients, batch, size, channels_last=True, compiled=False):
    """The same work in PyTorch, clients one after the other, each with weights and momentum of its own."""
    torch, timm = import_timm()
    from benchmarks import torch_networks

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def one_client():
        if name in torch_networks.NETWORKS:
            model = torch_networks.NETWORKS[name](CLASSES, 1)
            model(torch.zeros(2, 1, size, size))  # which tells lazy layers their sizes
        else:
            model = timm.create_model(
                name.replace("efficientnetv2-", "tf_efficientnetv2_"), num_classes=CLASSES, in_chans=1,
                drop_rate=0.2, drop_path_rate=0.2,
            )  # fmt: skip
        model = model.to(device, memory_format=layout).train()
        return model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    sessions = [one_client() for _ in range(clients)]
    if compiled:  # the code is compiled once; the weights of each client are its arguments
        sessions = [(torch.compile(model), optimizer) for model, optimizer in sessions]
    images = torch.randn(batch, 1, size, size, device=device).to(memory_format=layout)
    labels = torch.randint(0, CLASSES, (batch,), device=device)

    def run(count):
        for model, optimizer in sessions:
            for _ in range(count):
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


def seconds(run, *arguments):
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def measured_execution(name, clients, batch, size):
    """What `launch.train` would choose for this on its first device."""
    chains = {form: models.create(name, CLASSES, 1, layer_form=form) for form in FORMS}
    profile = models.profile(chains[FORMS[0]], (size, size, 1))
    images = jax.ShapeDtypeStruct((batch, size, size, 1), jnp.float32)

    def of_client(one):
        chain = chains[one.layer_form]
        return execution.seconds_per_client(chain, profile, images, one.clients_per_chunk, jax.devices()[0])

    places = functools.partial(places_per_client, clients)
    return execution.choose(FORMS, execution.chunk_sizes(clients, 1), of_client, places)[0]


def compare(name, clients, batch, size, options):
    """A row: milliseconds of each side, and the medians over pairs of a peer's time over ours."""
    case, steps = (name, clients, batch, size), options.steps
    form, chunk = (
        (FORMS[0], options.clients_per_chunk) if options.clients_per_chunk else measured_execution(*case)
    )
    ours, flop = sfl_jax_round(*case, steps, chunk, form)
    peers = {
        "channels_last": pytorch_steps(*case),
        "default": pytorch_steps(*case, channels_last=False),
    }
    if options.torch_compile:
        peers["torch_compile"] = pytorch_steps(*case, compiled=True)
    if options.lax_conv:
        peers["lax_conv"] = sfl_jax_round(*case, steps, chunk, "conv")[0]
    for run in (ours, *peers.values()):
        run(1)
    pairs = []
    for _ in range(options.pairs):
        round_s, first_s = seconds(ours, steps), seconds(ours, 1)
        # A round of one step is that step, the start and the aggregation; a further step is nothing else.
        times = {"round": round_s / steps, "step": (round_s - first_s) / (steps - 1)}
        pairs.append(times | {peer: seconds(run, steps) / steps for peer, run in peers.items()})

    row = {"model": name, "clients": clients, "batch": batch, "size": size, "form": form, "chunk": chunk}
    for side in pairs[0]:
        row[f"{side}_ms"] = round(1e3 * statistics.median(times[side] for times in pairs), 1)
    for peer in peers:
        row[f"{peer}_ratio"] = round(statistics.median(times[peer] / times["round"] for times in pairs), 2)
    row["of_ceiling"] = round(flop / statistics.median(times["step"] for times in pairs) / ceiling_flops(), 3)
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="b0", help="variants of EfficientNetV2, resnet18 or cnn")
    parser.add_argument("--clients", default="16")
    parser.add_argument("--batches", default="32")
    parser.add_argument("--sizes", default="32")
    parser.add_argument("--steps", type=int, default=4, help="local steps of a round, at least 2")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--clients_per_chunk", type=int, default=0, help="0: measured, as launch.train does")
    parser.add_argument("--torch_compile", action="store_true", help="also PyTorch compiled; takes minutes")
    parser.add_argument("--lax_conv", action="store_true", help="also lax.conv under vmap; slow on a CPU")
    parser.add_argument("--json", help="a file for all figures")
    options = parser.parse_args()
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, ceiling {ceiling_flops() / 1e9:.0f} GFLOP/s"
    )
    cases = itertools.product(
        options.models.split(","),
        *(map(int, text.split(",")) for text in (options.clients, options.batches, options.sizes)),
    )
    rows = []
    for name, clients, batch, size in cases:
        known = name if name in NETWORKS else f"efficientnetv2-{name}"
        row = compare(known, clients, batch, size, options)
        if not rows:
            print("  ".join(row))
        print("  ".join(str(value).rjust(len(key)) for key, value in row.items()), flush=True)
        rows.append(row)
        if options.json:
            pathlib.Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
