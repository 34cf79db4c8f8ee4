"""A round of federated averaging here and in Flower's simulation, in pairs: python -m benchmarks.flower

Both train EfficientNetV2-B0 (Flower: timm's, in channels_last) on 10 clients with 18 batches of 32 images of
32x32, one local epoch, SGD with momentum. Flower has one actor with one thread for each core. Prints the
seconds of a round of each, and Flower's over ours, median over the rounds. Needs the `benchmark` extra and
`pip install "flwr[simulation]"`, which is in no extra because it brings Ray.
"""

import argparse
import os
import statistics
import time

from benchmarks.training_speed import measured_execution, seconds, sfl_jax_round
from sfl_jax.federated import cores

CLASSES = 10


def client_app(batches, batch, size):
    """Flower's client: one epoch of SGD on its own random images."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message, context):
        import torch

        torch.set_num_threads(1)
        model = network().to(memory_format=torch.channels_last).train()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        images = torch.randn(batch, 1, size, size).to(memory_format=torch.channels_last)
        labels = torch.randint(0, CLASSES, (batch,))
        for _ in range(batches):
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": batches * batch}),
        }
        return Message(content=RecordDict(content), reply_to=message)

    return app


def network():
    """B0 of timm for one grey channel."""
    from benchmarks.torch_peers import import_timm

    _, timm = import_timm()
    return timm.create_model("tf_efficientnetv2_b0", num_classes=CLASSES, in_chans=1)


def compared(ours, options):
    """(seconds of Flower's round, of ours) for each round after the first, which starts the actors."""
    from flwr.app import ArrayRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    pairs = []

    class Timed(FedAvg):
        """Measures from the sending of the model to its new mean; then our round runs."""

        def configure_train(self, *given):
            self.begun = time.perf_counter()
            return super().configure_train(*given)

        def aggregate_train(self, *given):
            result = super().aggregate_train(*given)
            pairs.append((time.perf_counter() - self.begun, seconds(ours, options.steps)))
            return result

    server = ServerApp()

    @server.main()
    def main(grid, context):
        strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=options.clients)
        arrays = ArrayRecord(network().state_dict())
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=options.rounds + 1)

    run_simulation(
        server, client_app(options.steps, options.batch, options.size), options.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0}, "init_args": {"num_cpus": os.cpu_count()},
        },
    )  # fmt: skip
    return pairs[1:]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("clients", 10), ("steps", 18), ("batch", 32), ("size", 32), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    try:
        import flwr
    except ImportError:
        raise SystemExit('flower: is not installed; pip install "flwr[simulation]"') from None
    cores.cores_as_devices(64)
    case = "efficientnetv2-b0", options.clients, options.batch, options.size
    form, chunk = measured_execution(*case)
    ours, _ = sfl_jax_round(*case, options.steps, chunk, form)
    ours(1)
    pairs = compared(ours, options)
    for theirs_s, ours_s in pairs:
        print(
            f"Flower {flwr.__version__} {theirs_s:.2f} s, ours {ours_s:.2f} s, {theirs_s / ours_s:.2f} times"
        )
    print(f"median {statistics.median(theirs / own for theirs, own in pairs):.2f} times")


if __name__ == "__main__":
    main()
