"""`Run`: a training composed of its parts, and what can be done with it."""

import functools
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sfl_jax import codecs, datasets, models, optim, planning, schemes
from sfl_jax.datasets.augment import augmentation, check_images
from sfl_jax.datasets.images import scaled
from sfl_jax.errors import BadInput
from sfl_jax.federated import cores, optimizers
from sfl_jax.federated import devices as federated_devices
from sfl_jax.federated.evaluation import BATCH, Metric, accuracy, batch_of
from sfl_jax.federated.execution import Execution
from sfl_jax.federated.kept import NOTHING
from sfl_jax.federated.session import Augment, Loss, Training, cross_entropy
from sfl_jax.fleet import Faults, Fleet, Sampling, check_devices
from sfl_jax.planning import Planned, Planner
from sfl_jax.run import clients, loop, metrics, saving, suiting, wires
from sfl_jax.run.engine import Engine, compile_rounds, entering_network, kept_programs
from sfl_jax.run.parts import Parts, Say, always, silent
from sfl_jax.run.rounds import asked, cohort
from sfl_jax.run.state import State, is_held, resume, start

Line = metrics.Round
REESTIMATED = "reestimated"


class Evaluated(NamedTuple):
    """The model's mean loss and mean metric on some samples."""

    loss: float
    accuracy: float


class Run:
    """A split federated training, composed of its parts.

        run = sfl_jax.Run(chain=…, data=…, fleet=…, optimizer=optax.sgd(0.05, momentum=0.9))
        for line in run.rounds(20):
            print(line.round, line.test_accuracy, line.simulated_s)

    Args:
      chain: the network: `sfl_jax.Chain([...])` of Flax modules, or `sfl_jax.models.create(name)`.
      data: the samples, for example from `sfl_jax.datasets.from_arrays` or `load`.
      fleet: the clients, for example from `sfl_jax.fleet.random_fleet` or `read_fleet`.
      optimizer: the optimiser of the local steps: an optax transformation with its learning rate.
      scheme: "sfl", "sfl_v2", "psl", "sl" or "fl", or a member of `sfl_jax.schemes` with its own options. It
        says whose copy of a unit a step uses.
      codec: changes smashed data and their gradient at the cut. A name such as "int8" or "topk:0.1", or a
        member of `sfl_jax.codecs`. From a list of codecs the planner chooses one for each client.
      codec_down: another codec for the gradient.
      planner: plans each round.
      cohort_size: how many clients take part in a round; by default all.
      local_epochs, batch_size: the work of a client in a round.
      rate: a factor on the learning rate by round, counted from 0.
      partition: divides the training samples among clients: "iid", "dirichlet", "shards", "quantity", "fleet"
        (as the column samples of the fleet says), or the indices of each client's samples. "auto" takes the
        splits of the data, else the fleet's column if there is one, else iid.
      preprocess: turns stored samples (B, ...) into the network's input. By default uint8 becomes -1 to 1;
        floats and tokens stay as they are.
      variables: the initial variables; by default they are drawn.
      server_optimizer: an optax transformation that the server applies to the clients' mean change.
      sampling: draws the clients of each round, and knows when they are available.
      augment: changes the images of local steps at random. A text such as "shift:2+flip", see
        `sfl_jax.datasets.augment.augmentation`, or a function of stored images (B, ...) and a key.
      proximal: FedProx's factor on the distance from the global parameters; 0 is none.
      clip_norm: the largest norm of a unit's gradient in a local step; 0 clips nothing.
      batch_norm: what happens to normalisation layers after a round. "averaged": they are averaged.
        "local_statistics": each client keeps its running statistics. "local": scales and biases too.
        "reestimated": the clients estimate the statistics of the new model.
      faults: what goes wrong with clients.
      execution: how the devices compute a round.
      devices: how many devices to use; 0 is all.
      eval_every: rounds between evaluations on the test samples.
      loss: the loss of each sample, from logits (B, classes) and labels (B,). By default cross-entropy.
      metric: a number for each test sample, from the same. Its mean is `Line.test_accuracy`.
      skip_diverged: whether to leave out a client whose numbers are not finite. If False, it ends the run.
      rivals: planning methods whose simulated clocks run beside that of the plan, see `State.simulated_s`.
      seed: draws everything random except plans and links, which `planner.seed` draws.

    Raises:
      BadInput: a part is not valid, or parts do not fit together; the line names the part.
    """

    def __init__(
        self,
        *,
        chain: models.Chain,
        data: datasets.Dataset,
        fleet: Fleet,
        optimizer: optax.GradientTransformation | optimizers.LocalOptimizer,
        scheme: str | schemes.Scheme = "sfl",
        codec: str | codecs.Codec | Sequence[str | codecs.Codec] = "float32",
        codec_down: str | codecs.Codec | None = None,
        planner: Planner = Planner(),  # noqa: B008 frozen
        cohort_size: int | None = None,
        local_epochs: int = 1,
        batch_size: int = 32,
        rate: Callable[[int], float] = always,
        partition: str | Sequence[np.ndarray] = "auto",
        preprocess: Callable[[Any], Any] = scaled,
        variables: models.Variables | None = None,
        server_optimizer: optax.GradientTransformation | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 frozen
        augment: str | Augment | None = None,
        proximal: float = 0.0,
        clip_norm: float = 0.0,
        batch_norm: str = "averaged",
        faults: Faults = Faults(),  # noqa: B008 frozen
        execution: Execution = Execution(),  # noqa: B008 frozen
        devices: int = 0,
        eval_every: int = 1,
        skip_diverged: bool = False,
        loss: Loss = cross_entropy,
        metric: Metric = accuracy,
        rivals: Sequence[str] = (),
        seed: int = 0,
    ):
        cohort_size = len(fleet) if cohort_size is None else cohort_size
        numbers = {"cohort_size": cohort_size, "local_epochs": local_epochs, "batch_size": batch_size}
        for name, value in (numbers | {"eval_every": eval_every}).items():
            _check_positive(name, value)
        if cohort_size > len(fleet):
            raise BadInput(
                f"cohort_size={cohort_size}: must be at most {len(fleet)}, the clients of the fleet"
            )
        scheme = schemes.create(scheme)
        scheme.check(len(chain))
        suiting.check_faults(scheme, faults, skip_diverged)
        planner = suiting.planner_for(scheme, planner)
        suiting.check_rivals(planner, rivals)
        execution = suiting.execution_for(scheme, execution, cohort_size)
        most = scheme.max_cut(len(chain)) if planner.max_cut is None else planner.max_cut
        if most > scheme.max_cut(len(chain)):
            raise BadInput(f"max_cut={most}: must be at most {scheme.max_cut(len(chain))}")
        if planner.min_cut > len(chain):
            raise BadInput(f"min_cut={planner.min_cut}: must be at most {len(chain)}, the units of the chain")
        personal = suiting.personal_for(scheme, batch_norm, len(fleet))
        if devices != 1:
            cores.cores_as_devices(cohort_size)
        if execution.layer_form != "auto":
            chain = chain.in_form(execution.layer_form)
        stored = data.train_images.shape[1:]
        augment = augmentation(augment) if isinstance(augment, str) else augment
        check_images(augment, stored)
        entering = entering_network(preprocess, data, 1)
        image_shape = entering.shape[1:]
        fresh = functools.partial(_fresh, chain, entering, seed)
        params = jax.eval_shape(fresh).params
        if not isinstance(optimizer, optimizers.LocalOptimizer):
            if not isinstance(optimizer, optax.GradientTransformation):
                kind = type(optimizer).__name__
                raise BadInput(f"optimizer: {kind}; must be an optax transformation, such as optax.sgd(0.05)")
            optimizer = optimizers.of_optax(optimizer, params)
        division = _divide(data, fleet, partition, seed)
        suiting.check_steps(scheme, division, batch_size)
        owners = fleet.with_samples([len(share) for share in division])
        planning.check_links(planner, owners)
        sample = jax.ShapeDtypeStruct(image_shape, entering.dtype)
        profile = models.profile(chain, sample, stored_shape=stored)
        check_devices(list(fleet.devices.values()), profile.names, batch_size)
        work = optim.Work(
            local_epochs, batch_size, min_cut=planner.min_cut, optimizer_slots=optimizer.slots,
            image_bits=8 * data.train_images.dtype.itemsize, max_cut=most,
            tail_units=scheme.tail_units, proximal=proximal > 0, step_once=scheme.step_once(len(chain)),
        )  # fmt: skip
        chosen = wires.pairs(codec, codec_down)
        terms = optim.terms(profile, owners, work, wires.wires(chosen, profile))  # pyright: ignore[reportArgumentType] has samples
        training = Training(
            chain, optimizer, preprocess, server_optimizer=server_optimizer, skip_diverged=skip_diverged,
            loss=loss, scheme=scheme.engine(), tail_units=scheme.tail_units, codecs=wires.cut_codecs(chosen),
            augment=augment, proximal=proximal, clip_norm=clip_norm, personal=personal,
            reestimates=batch_norm == REESTIMATED,
        )  # fmt: skip
        initial = fresh if variables is None else functools.partial(_given, variables, jax.eval_shape(fresh))
        parts = Parts(
            data, division, owners, profile, terms, training, initial, scheme, planner, faults, image_shape,
            cohort_size, local_epochs, batch_size, rate, eval_every, seed, execution,
            suiting.devices_for(scheme, devices), tuple(rivals), metric, sampling, _name(chain, image_shape),
        )  # fmt: skip
        self._use(parts)

    @classmethod
    def of(cls, parts: Parts) -> "Run":
        """A run of parts that were checked already. `start` or `resume` gives it a state."""
        run = cls.__new__(cls)
        run._use(parts)
        return run

    def _use(self, parts: Parts) -> None:
        self.parts = parts
        self.engine: Engine | None = None
        self._state: State | None = None
        self._kept = NOTHING
        self._before: Execution | None = None  # how the restored run was computed
        self.lines: list[Line] = []
        self._stopwatch, self._compiling = metrics.Stopwatch(), metrics.CompileClock()

    @property
    def state(self) -> State:
        """The state of the run. It is drawn when it is first needed."""
        if self._state is None:
            self._state = start(self.parts)
        return self._state

    @property
    def round(self) -> int:
        """How many rounds are done."""
        return self.state.round

    @property
    def is_held(self) -> bool:
        """Whether the model still exists. It does not while it is donated to a round."""
        return is_held(self.state)

    @property
    def tried(self) -> dict[Any, float]:
        """Measured seconds of each alternative, once the run is compiled."""
        return self.engine.tried if self.engine else {}

    @property
    def variables(self) -> models.Variables:
        """The global model in NumPy arrays. Each field is a tuple with one pytree for each unit."""
        return jax.device_get(federated_devices.on_first(self.state.model).variables)

    def load(self, notes: Path | None) -> None:
        """Begin to load, in a thread, what earlier starts kept of the round's program beside `notes`."""
        self._kept = kept_programs(self.parts, notes)

    def start(self) -> None:
        """Draws or reads the first weights now. Otherwise this happens when they are first needed."""
        self._state = start(self.parts)

    def resume(self, checkpoints: Any, progress: Any) -> None:
        """Goes on from a checkpoint."""
        self._state = resume(self.parts, checkpoints, progress)

    def compile(
        self,
        until: int | None = None,
        before: Execution | None = None,
        notes: Path | None = None,
        say: Say = silent,
    ) -> None:
        """Settles the execution, places the data, and compiles a round and an evaluation.

        until: rounds of the whole run. If they are done, no round is compiled. before, notes: see
        `tuning.settle`.
        """
        more, before = until is None or self.round < until, before or self._before
        self.parts, self.engine = compile_rounds(self.parts, self.state, before, notes, say, more, self._kept)

    def rounds(
        self,
        rounds: int,
        clock: metrics.Stopwatch | None = None,
        pauses: Callable[[int], bool] = lambda round: True,
        progress: bool | None = None,
    ) -> Generator[Line, None, None]:
        """Trains `rounds` more rounds. Yields the line of each round when it is done.

        Args:
          clock: measures the lines' `wall_s`.
          pauses: whether the caller needs the state after n rounds in all. If not, short rounds are sent
            ahead, and the model after a line may be gone, see `is_held`.
          progress: whether to show a progress bar; by default on a terminal.

        Raises:
          BadInput: `rounds` is less than 1, or a round cannot be planned.
          loop.Diverged: numbers are not finite.
        """
        _check_positive("rounds", rounds)
        until, ours = self.round + rounds, clock is None
        rounds_asked = ((i, *asked(self.parts, i)) for i in range(self.round, until))
        cohorts = ((i, ids[is_there]) for i, ids, is_there in rounds_asked if is_there.any())
        planning.check_rounds(self.parts.planner, self.parts.fleet, self.parts.terms, cohorts)
        if self.engine is None:
            with self._compiling:
                self.compile()
        assert self.engine is not None
        going = loop.run(self.parts, self.state, self.engine, until, clock or self._stopwatch, pauses)
        return self._lines(_shown(going, self.round, until, ours if progress is None else progress))

    def _lines(self, going):
        try:
            for self._state, line in going:
                self.lines.append(line)
                yield line
        except loop.Diverged as error:
            self._state = error.state
            raise

    def client_variables(self, client: int) -> models.Variables:
        """The global model with what the client of this index keeps of its own, see `batch_norm`."""
        return jax.device_get(self._packed(client).unpack())

    def _packed(self, client=None):
        """The model on the first device, of a client or of none."""
        model, personal = federated_devices.on_first(self.state.model), self.parts.training.personal
        if client is None or personal is None:
            return model.packed
        return personal.merged(model.packed, jax.tree.map(lambda x: x[client], model.kept))

    def predict(self, images: Any, client: int | None = None) -> np.ndarray:
        """Logits (N, classes) of samples (N, ...) in inference mode. Samples have the form of the data.

        client: the index of a client. If clients keep their own normalisation, that of this client is used.
        """
        images = datasets.as_stored("images", images, self.parts.data.train_images)
        size = min(batch_of(self.parts.image_shape), len(images))
        filled = np.resize(images, (-(-len(images) // size) * size, *images.shape[1:]))  # whole batches
        packed = self._packed(client)
        logits = [
            np.asarray(_logits(self.parts.training, packed, filled[first : first + size]))
            for first in range(0, len(filled), size)
        ]
        return np.concatenate(logits)[: len(images)]

    def evaluate(self, images: Any = None, labels: Any = None) -> Evaluated:
        """Loss and accuracy of the model on these samples; by default on the test samples."""
        data = self.parts.data
        images, labels = (data.test_images, data.test_labels) if images is None else (images, labels)
        labels = np.asarray(labels)
        logits = self.predict(images)
        if labels.shape != logits.shape[:1]:
            raise BadInput(f"labels: have shape {labels.shape}; must be one for each of {len(logits)} images")
        losses = self.parts.training.loss(jnp.asarray(logits), jnp.asarray(labels))
        return Evaluated(
            float(np.asarray(losses, np.float64).mean()), float(self._metric(logits, labels).mean())
        )

    def client_accuracies(self, held_out: bool = False) -> np.ndarray:
        """The accuracy of the model for each client; (clients,), NaN for a client without samples.

        It is that on the client's training samples; with `held_out`, on the test samples in the client's mix
        of classes. Where clients keep normalisation of their own, each is used for its client: with
        `held_out` all test samples then go through the network once for each client.
        """
        data, has_own = self.parts.data, self.parts.training.personal is not None
        if held_out:
            own = range(len(self.parts.division)) if has_own else [None]
            found = [clients.accuracies(self._by_class(client), self.parts.mix) for client in own]
            return np.diagonal(found) if has_own else found[0]
        if not has_own:
            right = self._metric(self.predict(data.train_images[:]), data.train_labels)
            return np.array([right[share].mean() if len(share) else np.nan for share in self.parts.division])
        return np.array([self._accuracy_of(k, share) for k, share in enumerate(self.parts.division)])

    def _accuracy_of(self, client, share):
        if not len(share):
            return np.nan
        # Batches of one shape for all clients, so that nothing compiles again.
        rows = np.resize(share, max(len(share), min(BATCH, max(map(len, self.parts.division)))))
        data = self.parts.data
        logits = self.predict(data.train_images[rows], client)[: len(share)]
        return self._metric(logits, data.train_labels[share]).mean()

    def _by_class(self, client):
        """The accuracy on the test samples of each class, NaN without samples."""
        data = self.parts.data
        right, labels = (
            self._metric(self.predict(data.test_images[:], client), data.test_labels),
            data.test_labels,
        )
        sums, counts = (np.bincount(labels, w, data.num_classes) for w in (right, np.ones(len(labels))))
        with np.errstate(invalid="ignore"):
            return sums / counts

    def _metric(self, logits, labels):
        return np.asarray(self.parts.metric(jnp.asarray(logits), jnp.asarray(labels)), np.float64)

    def plan(self) -> Planned:
        """The plan of the next round, with the clients and costs that it is made from."""
        parts = self.parts
        _, own, terms, available = cohort(parts, self.round)
        plan = planning.serve(parts.planner, own, terms, self.round, available).plan
        return Planned(parts.planner, parts.profile, own, terms, plan)

    def save(self, path: str | Path) -> None:
        """Saves the run in a directory. `restore` goes on from there with the same bits."""
        clocks = self._stopwatch.seconds, self._compiling.seconds
        saving.save(Path(path), self.parts, self.state, self.lines, *clocks)

    @classmethod
    def restore(cls, path: str | Path, **parts: Any) -> "Run":
        """Returns the run saved in a directory. Give it the same parts as `Run` was given.

        Raises BadInput if no run is saved there, or if a part differs from that of the saved run.
        """
        run = cls(**parts)
        checkpoints, progress, run.lines = saving.read(Path(path), run.parts)
        run.resume(checkpoints, progress)
        run._before = Execution(**progress.settings)
        run._stopwatch = metrics.Stopwatch(progress.wall_s)
        run._compiling = metrics.CompileClock(progress.compile_s)
        return run


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise BadInput(f"{name}={value}: must be an integer, at least 1")


def _fresh(chain, entering, seed) -> models.Variables:
    return chain.init(jax.random.key(seed), jnp.zeros(entering.shape, entering.dtype))


def _given(variables, like) -> models.Variables:
    """The initial variables. BadInput if they belong to another network."""
    if jax.tree.structure(variables) != jax.tree.structure(like):
        raise BadInput("variables: must have the structure that chain.init returns")
    for given, wanted in zip(jax.tree.leaves(variables), jax.tree.leaves(like), strict=True):
        if given.shape != wanted.shape:
            raise BadInput(f"variables: an array of shape {given.shape}; the chain has {wanted.shape} there")
    return variables


def _divide(data, fleet, partition, seed) -> list[np.ndarray]:
    """The indices of each client's training samples."""
    if not isinstance(partition, str):
        if len(partition) != len(fleet):
            raise BadInput(f"partition: has {len(partition)} clients; the fleet has {len(fleet)}")
        return list(datasets.check_splits("partition", partition, len(data.train_labels)))
    if partition == "auto" and data.splits:
        return _divide(data, fleet, data.splits, seed)
    if partition == "auto":
        partition = "iid" if fleet.samples is None else "fleet"
    if partition == "fleet" and fleet.samples is None:
        raise BadInput("partition=fleet: needs a fleet with samples")
    return datasets.partition(data.train_labels, len(fleet), name=partition, samples=fleet.samples, seed=seed)


def _name(chain, image_shape) -> str:
    """A name that distinguishes networks in the notes of earlier measurements."""
    return f"{saving.described(chain.units)[:16]} at {'x'.join(map(str, image_shape))}"


def _shown(going, done, until, shows):
    """The rounds, with a progress bar on a terminal."""
    if not (shows and sys.stderr.isatty()):
        return going
    from tqdm import tqdm

    return tqdm(going, initial=done, total=until, unit="round", dynamic_ncols=True)


@functools.partial(jax.jit, static_argnames="training")
def _logits(training, packed, images):
    logits, _ = training.chain.alone().apply(packed.unpack(), training.preprocess(images))
    return logits
