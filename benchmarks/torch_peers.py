"""Local training in PyTorch: one client after the other, in processes of one thread, or as CUDA graphs.

Nothing here imports JAX, so that a worker process costs as much as a PyTorch user's.
"""

import enum
import importlib.machinery
import multiprocessing
import os
import sys
import time
import types

CLASSES = 10


def pytorch_steps(name, clients, batch, size, channels_last=True, compiled=False):
    """The same work in PyTorch, one client after the other, each with its own weights and momentum."""
    torch, sessions, images, labels = _sessions(name, clients, batch, size, channels_last, compiled)

    def run(count):
        for model, optimizer in sessions:
            for _ in range(count):
                optimizer.zero_grad(set_to_none=True)
                torch.nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()

    return run


def cuda_graphs(name, clients, batch, size, streams=4):
    """The same work on a GPU: each client's step is one CUDA graph, and clients take turns on streams."""
    torch, sessions, images, labels = _sessions(name, clients, batch, size)
    lanes = [torch.cuda.Stream() for _ in range(streams)]
    recorded = []
    for place, (model, optimizer) in enumerate(sessions):

        def step(model=model, optimizer=optimizer):
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

        lane, graph = lanes[place % streams], torch.cuda.CUDAGraph()
        lane.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(lane):  # a graph may be recorded only after some steps of this kind
            for _ in range(3):
                optimizer.zero_grad(set_to_none=True)
                step()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=lane):
            step()
        recorded.append((graph, lane))

    def run(count):
        for _ in range(count):
            for graph, lane in recorded:
                with torch.cuda.stream(lane):
                    graph.replay()
        torch.cuda.synchronize()

    return run


def _sessions(name, clients, batch, size, channels_last=True, compiled=False):
    """(torch, a model and its optimiser for each client, a batch of images, its labels)."""
    torch, timm = import_timm()
    from benchmarks import torch_networks

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def one_client():
        if name in torch_networks.NETWORKS:
            model = torch_networks.NETWORKS[name](CLASSES, 1)
            model(torch.zeros(2, 1, size, size))  # gives lazy layers their sizes
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
    return torch, sessions, images, torch.randint(0, CLASSES, (batch,), device=device)


def import_timm():
    """(torch, timm). timm imports torchvision, which is not used here, so empty modules replace it."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: torchvision was built for another torch
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


class Workers:
    """One process with one thread per core, each with a part of the clients: PyTorch's fastest way on a CPU.

    workers(count) runs `count` steps of every client and returns when the last process is done. `cpu_s` is
    then the CPU time of all processes in that call.
    """

    def __init__(self, name, clients, batch, size, processes, compiled=False):
        context = multiprocessing.get_context("spawn")
        shares = [len(range(place, clients, processes)) for place in range(processes)]
        self.cpu_s, self.pipes, self.children = 0.0, [], []
        for share in filter(None, shares):
            ours, theirs = context.Pipe()
            case = name, share, batch, size, compiled
            child = context.Process(target=_work, args=(theirs, case), daemon=True)
            child.start()
            self.pipes.append(ours)
            self.children.append(child)
        for pipe in self.pipes:
            pipe.recv()  # the worker is ready

    def __call__(self, count):
        for pipe in self.pipes:
            pipe.send(count)
        self.cpu_s = sum(pipe.recv() for pipe in self.pipes)

    def close(self):
        """Ends the processes."""
        for pipe in self.pipes:
            pipe.send(None)
        for child in self.children:
            child.join()


def _work(pipe, case):
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    *shape, compiled = case
    run = pytorch_steps(*shape, compiled=compiled)
    run(1)
    pipe.send("ready")
    while (count := pipe.recv()) is not None:
        before = time.process_time()
        run(count)
        pipe.send(time.process_time() - before)
