"""A run as one page of HTML with its pictures. It needs no other file and no network."""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sfl_jax.commands import page, parts, pictures, totals, words
from sfl_jax.commands.config import Config, fields_of, settings
from sfl_jax.commands.fields import said
from sfl_jax.commands.page import Mark
from sfl_jax.commands.pictures import Bar, Curve, style
from sfl_jax.commands.program import program
from sfl_jax.run.clocks import Clock
from sfl_jax.run.history import History
from sfl_jax.run.ledger import sent_bytes
from sfl_jax.run.metrics import Round, attendance

OPTIMAL = 1e-6  # a plan whose round is nearer to its proven bound, relative, is called optimal
_WITHOUT_SPLIT = "no_split"
_ACCURACY = "test accuracy, %"
_COUNTED = "All rounds together, counted in closed form. Memory is the most of any round."


def report(
    config: Config,
    environment: Mapping[str, Any],
    lines: Sequence[Round],
    clocks: Mapping[str, Clock],
    history: History | None = None,
    note: str = "",
) -> str:
    """The page of a run.

    clocks: of each method, the run's own first. history: of the run's plans, if they are known. note: says
    what is left out.
    """
    title = f"{config.model} on {config.dataset}"
    own, *_ = clocks
    return page.document(title, [
        page.heading(title, _below(config, lines, own)),
        page.tiles(_headline(lines, clocks, history)),
        *([page.paragraph(note)] if note else []),
        page.section("Accuracy", f"One training, on the clock of every method: {_whose(config)}."),
        *_accuracy(config, lines, clocks),
        page.section("Rounds", _about_rounds(config)),
        page.cards(_rounds(config, lines, clocks, history)),
        page.section("Bytes, work and memory", _COUNTED),
        page.cards(
            [
                page.card("This plan", page.table(totals.run_rows(clocks[own]))),
                page.card(
                    "To an accuracy",
                    page.grid(totals.accuracy_rows(clocks, [line.test_accuracy for line in lines])),
                ),
            ],
            "tables",
        ),
        page.card("Every method", page.grid(totals.method_rows(clocks))),
        page.section("Settings, software and machine"),
        page.cards([settings_card(config, "train"), made_with_card(environment), *_wall(lines)], "parts"),
    ])  # fmt: skip


def _whose(config):
    return words.whose_accuracy(config.deadline_factor, parts.cuts_matter(config))


def _below(config, lines, own) -> str:
    cohort = attendance(config.cohort_size, config.clients, [line.clients for line in lines])
    done = f"{lines[-1].round} of {config.rounds} rounds, each of {cohort}"
    return f"{done}; scheme {config.scheme}, planned by {own}"


def _headline(lines, clocks, history) -> Iterator[tuple[str, str, str]]:
    tested = [(line.round, line.test_accuracy) for line in lines if line.test_accuracy is not None]
    if tested:
        round, accuracy = tested[-1]
        best = max(part for _, part in tested)
        yield "Test accuracy", words.percent(accuracy), f"after round {round}; best {words.percent(best)}"
    else:
        yield "Test accuracy", words.NONE, "no round was evaluated yet"
    yield _time(clocks)
    yield _sent(clocks)
    gaps = _gaps(lines, history)
    if len(gaps) and gaps.max() < OPTIMAL:
        yield "Proven gap", "optimal", f"every round's plan, within {gaps.max():.0e} of its proven bound"
    elif len(gaps):
        mean = words.percent(gaps.mean())
        yield "Proven gap", words.percent(gaps.max()), f"at most above the proven bound; {mean} in the mean"
    failed = sum(line.clients == 0 for line in lines)
    if failed:
        yield "Failed rounds", str(failed), "without a client"


def _gaps(lines, history) -> np.ndarray:
    """Each round's plan above its bound, relative. A round with delays lasts longer than its plan."""
    lasted = [line.round_s for line in lines] if history is None else history.planned_s
    pairs = [(s, line.bound_s) for s, line in zip(lasted, lines, strict=True) if s and line.bound_s]
    return np.array([max(0.0, float(s) / bound_s - 1) for s, bound_s in pairs])


def _time(clocks) -> tuple[str, str, str]:
    own, *_ = clocks
    own_s = float(clocks[own].seconds[-1])
    other = clocks.get(_WITHOUT_SPLIT)
    if (
        own == _WITHOUT_SPLIT
        or other is None
        or not math.isfinite(other.seconds[-1])
        or not other.seconds[-1]
    ):
        return "Simulated time", words.clock(own_s), "of all rounds"
    other_s = float(other.seconds[-1])
    saved = 1 - own_s / other_s
    if abs(saved) < words.ALIKE:
        return "Time saved", words.percent(0.0, 0), f"{words.clock(own_s)}, as long as without a split"
    beside = words.beside(other_s, own_s).removeprefix("this plan is ")
    remark = f"{words.clock(own_s)} instead of {words.clock(other_s)} without a split: {beside}"
    return (
        ("Time saved", words.percent(saved, 1), remark)
        if saved >= 0
        else ("Time lost", f"{-100 * saved:.1f} %", remark)
    )


def _sent(clocks) -> tuple[str, str, str]:
    own, *_ = clocks
    whole = totals.totals(clocks[own].ledger)
    up, down = whole["up_bytes"], whole["down_bytes"]
    if not math.isfinite(up + down):
        return "Bytes sent", words.NONE, "not counted by the release that made this run"
    remark = f"up {words.amount(up, 'B')}, down {words.amount(down, 'B')}"
    if own != _WITHOUT_SPLIT and _WITHOUT_SPLIT in clocks:
        others = totals.totals(clocks[_WITHOUT_SPLIT].ledger)
        other = others["up_bytes"] + others["down_bytes"]
        if math.isfinite(other) and other > 0:
            part = (up + down) / other - 1
            if abs(part) < words.ALIKE:
                return "Bytes sent", words.amount(up + down, "B"), f"{remark}; as many as without a split"
            remark += f"; {words.percent(abs(part), 0)} {'more' if part > 0 else 'less'} than without a split"
    return "Bytes sent", words.amount(up + down, "B"), remark


def _accuracy(config, lines, clocks) -> list[str]:
    """The accuracy against simulated seconds, rounds and bytes, below a legend."""
    own, *_ = clocks
    known = {name: clock for name, clock in clocks.items() if math.isfinite(clock.seconds[-1])}
    percent = np.array([math.nan if (a := line.test_accuracy) is None else 100 * a for line in lines])
    rounds = [line.round for line in lines]
    sent = {name: np.cumsum(sent_bytes(clock.ledger)) for name, clock in known.items()}
    most = max((float(values[-1]) for values in sent.values() if math.isfinite(values[-1])), default=1.0)
    unit, size = words.byte_unit(most)

    def drawn(of: Mapping[str, Any], said) -> list[Curve]:
        def text(name):
            return lambda i: f"{name}\n{percent[i]:.2f} % after round {rounds[i]}\n{said(of[name][i])}"

        ordered = sorted(of, key=lambda name: name == own)  # the run's own on top
        widths = (3.0 if name == own else 1.8 for name in ordered)
        return [
            Curve(of[n], percent, text(n), *style(n, own), width)
            for n, width in zip(ordered, widths, strict=True)
        ]

    times = {name: clock.seconds for name, clock in known.items()}
    scaled = {name: values / size for name, values in sent.items()}
    by_round = Curve(
        rounds, percent, lambda i: f"round {rounds[i]}: {percent[i]:.2f} %", *style(own, own), 3.0
    )
    spread = _worst_clients(lines, rounds)
    marks = [Mark("all test samples", "blue"), Mark("worst client", "grey", "2 3")] if spread else []
    ends = [float(values[-1]) for values in times.values()]
    depends = config.deadline_factor or parts.cuts_matter(config)
    names = {name: f"{name} (this plan)" if name == own else name for name in known}
    time, round, sending = (
        pictures.curves(
            "Accuracy by simulated time",
            "How long training takes on this fleet, by the method that plans.",
            drawn(times, words.clock),
            "simulated seconds",
            _ACCURACY,
            log=max(ends) > 10 * min(ends) > 0,
        ),
        pictures.curves(
            "Accuracy by round",
            "Of this plan." if depends else "The same for all methods.",
            [*spread, by_round],
            "round",
            _ACCURACY,
            rounds=True,
            marks=marks,
        ),
        pictures.curves(
            "Accuracy by bytes",
            "All bytes sent so far, both ways, all clients together.",
            drawn(scaled, lambda x: words.amount(size * x, "B")),
            f"sent so far, {unit}",
            _ACCURACY,
        ),
    )
    return [
        page.legend(Mark(label, *style(name, own)) for name, label in names.items()),
        page.cards([time, round, sending]),
    ]


def _worst_clients(lines, rounds) -> list[Curve]:
    """The accuracy of the client for whom the model is worst, where it is known."""
    worst = [math.nan if (a := line.client_accuracy_worst) is None else 100 * a for line in lines]
    if np.isnan(worst).all():
        return []
    return [
        Curve(rounds, worst, lambda i: f"worst client, round {rounds[i]}: {worst[i]:.2f} %", "grey", "2 3")
    ]


def _about_rounds(config) -> str:
    about = "Every round has its own clients, cuts and shares."
    if config.jitter or config.drop_probability or config.deadline_factor:
        about += " Seconds by term are those of the plan; delays and drop-outs come on top."
    return about


_BARRIERS = {
    "session": "The client that holds the round up most: its terms add up to the planned round.",
    "staged": "The slowest client before the server, all work of the server, the slowest client after it.",
    "in_turn": "The slowest model down and up, and between them the sum over the clients, which take turns.",
    "handover": "The sum over the clients: one session follows the other.",
    "lockstep": "In each step all clients wait for the slowest.",
}


_HOLDERS = {
    "session": "The part of all rounds that a client held up. Clients that end together share a round by"
    " what it would gain from them.",
    "staged": "The slowest client before the server holds up half of a round, the slowest after it half.",
}
_IN_TURN = "The part of all seconds that a client's sessions took, since others wait for them."


def _rounds(config, lines, clocks, history) -> Iterator[str]:
    own, *_ = clocks
    if len(clocks) > 1:
        yield pictures.method_times(clocks, own)
    if history is not None:
        barrier = parts.scheme(config).clock if config.scheme not in ("sfl", "fl") else config.barrier
        round_s, bound_s = (
            [getattr(line, name) or math.nan for line in lines] for name in ("round_s", "bound_s")
        )
        yield pictures.seconds_by_term(history, round_s, bound_s, _BARRIERS[barrier])
        yield pictures.holders(history, _HOLDERS.get(barrier, _IN_TURN))
        yield pictures.cuts(history)
        if drawn := pictures.shares(history):
            yield drawn
    else:
        yield _round_times(lines)
    yield _losses(lines)


def _by_round(lines, name, label, said, colour, dashes="") -> Curve:
    values = _numbers(lines, name)
    return Curve(
        [line.round for line in lines], values, lambda i: f"round {i + 1}: {label} {said(values[i])}", colour,
        dashes,
    )  # fmt: skip


def _round_times(lines) -> str:
    """A round's seconds beside its bound, where the plans are not known."""
    drawn = [
        _by_round(lines, "round_s", "", words.clock, "blue"),
        _by_round(lines, "bound_s", "proven bound", words.clock, "ink", "2 3"),
    ]
    marks = [Mark("round", "blue"), Mark("proven bound", "ink", "2 3")]
    caption = "Simulated time of each round, and what no plan can go below."
    return pictures.curves(
        "A round's seconds",
        caption,
        drawn,
        "round",
        "simulated seconds",
        rounds=True,
        marks=marks,
        bottom=0.0,
    )


def _losses(lines) -> str:
    drawn = [
        _by_round(lines, "train_loss", "training loss", "{:.4f}".format, "sky"),
        _by_round(lines, "test_loss", "test loss", "{:.4f}".format, "blue"),
    ]
    marks = [Mark("training", "sky"), Mark("test", "blue")]
    caption = "Cross-entropy. Training: the mean over the round's local steps."
    return pictures.curves("Loss", caption, drawn, "round", "loss", rounds=True, marks=marks)


def _wall(lines) -> Iterator[str]:
    """A card with the parts of the wall time. Nothing for lines of releases that did not measure them."""
    last = lines[-1]
    trained, tested = (_numbers(lines, name).sum() for name in ("train_wall_s", "test_wall_s"))
    compiled = last.compile_wall_s
    if compiled is None or not math.isfinite(trained + tested):
        return
    rest = max(0.0, last.wall_s - trained - tested - compiled)
    kinds = (
        ("training", trained, "rounds on the devices, and planning where they wait for it", "green"),
        ("evaluation", tested, "test samples on the devices", "sky"),
        ("compiling", compiled, "tracing, lowering and compiling, in all threads together", "amber"),
        ("the rest", rest, "reading data, planning, saving, waiting", "grey"),
    )
    rows = [
        Bar(
            name,
            s,
            f"{s:,.1f} s",
            f"{name}: {s:,.1f} s, {words.percent(s / last.wall_s, 0)}\n{about}",
            colour,
        )
        for name, s, about, colour in kinds
    ]
    caption = f"Seconds of this machine, {last.wall_s:,.1f} s in all. Nothing here is simulated."
    yield pictures.bars("Where wall time went", caption, rows)


def _numbers(lines: Sequence[Round], name: str) -> np.ndarray:
    return np.array([getattr(line, name) for line in lines], float)  # NaN for None


def settings_card(config: Config, command: str) -> str:
    """The settings of a command that differ from its defaults, and the command line that repeats it."""
    chosen = settings(config, command)
    defaults = {field.name: field.default for field in fields_of(command)}
    changed = {name: value for name, value in chosen.items() if value != defaults[name]}
    flags = (f"--{name}={said(name, value)}" for name, value in changed.items())
    rows = [(name, said(name, value), said(name, defaults[name])) for name, value in changed.items()]
    rows = [("setting", "value", "default"), *rows]
    inside = [
        page.grid(rows, numbers=False) if changed else "",
        page.paragraph("The command that repeats this:"),
        page.code(shlex.join([*program(command).split(), *flags])),
        page.details(f"All {len(chosen)} settings", page.columns({n: said(n, v) for n, v in chosen.items()})),
    ]
    return page.card("Settings that differ from the defaults", "\n".join(inside))


def made_with_card(environment: Mapping[str, Any]) -> str:
    """Releases of packages, devices, and what else a run notes of its surroundings."""
    packages, devices = environment.get("packages"), environment.get("devices")
    shown = {
        "begun": environment.get("begun"),
        "devices": ", ".join(map(str, devices)) if isinstance(devices, list) else devices,
        "python": environment.get("python"),
        **(packages if isinstance(packages, Mapping) else {}),
        "commit": environment.get("git_commit"),
    }
    rows = [("what", "release"), *((name, str(value)) for name, value in shown.items() if value)]
    others = {name: value for name, value in environment.items() if name not in _SHOWN}
    inside = [
        page.grid(rows, numbers=False) if len(rows) > 1 else "",
        page.details("What was measured and read at the start", page.columns(others)) if others else "",
    ]
    return page.card("Made with", "\n".join(inside))


_SHOWN = ("begun", "devices", "python", "packages", "git_commit")
