"""`Study`: which methods, schemes, learning rates and seeds are run, and the configuration of each run."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from reproduction.protocol import check_options, check_scheme, varied_lr
from zoscale.config import ConfigError, RunConfig, build, parse, read_yaml
from zoscale.config.schema import fields_of
from zoscale.estimators import Estimator
from zoscale.methods import DEFAULTS, TABLES
from zoscale.passes import forward_equivalents
from zoscale.progress import examined

HERE = Path(__file__).parent
PRESETS = HERE / "presets"
Tree = dict[str, Any]


@dataclass(frozen=True)
class Scheme:
    """What is trained.

    Args:
        title: for the tables.
        tau: radius of the methods that take differences.
        config: part of a run's configuration.
        like: the scheme whose published numbers stand beside it.
        without: methods that it is not for.
    """

    title: str
    tau: float
    config: Tree
    like: str
    without: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Args:
        scheme: key in `Study.schemes`.
        method: key in `Study.methods`.
        config: of the run.
    """

    scheme: str
    method: str
    config: RunConfig

    @property
    def lr(self) -> float:
        """Of the optimizer."""
        return float(self.config.optimizer.args["lr"])

    def __str__(self) -> str:
        return f"{self.config.run_dir.name}, lr {self.lr:g}, seed {self.config.seed}"


@dataclass(frozen=True)
class Study:
    """A preset with what the command line changed of it.

    Args:
        tree: of the preset's file, with the sub-command's own section over it.
        methods: by key, `title` and `config`; in the order of the tables.
        schemes: by key.
        lrs: by scheme and method.
        seeds: the first one chooses the learning rate.
        forwards: forward equivalents of a training batch, per run.
        launch: words of the command that `launch/train.py` follows.
        jobs: cells that run at a time.
        out: folder of the runs and the report.
        options: `key=value`, over everything but the protocol.
    """

    tree: Tree
    methods: Mapping[str, Tree]
    schemes: Mapping[str, Scheme]
    lrs: Mapping[str, Mapping[str, list[float]]]
    seeds: tuple[int, ...]
    forwards: int
    launch: tuple[str, ...]
    jobs: int
    out: Path
    options: tuple[str, ...]

    @classmethod
    def of(cls, given: argparse.Namespace) -> Self:
        """From a command line (see `launch/reproduce.py`).

        Raises:
            ConfigError: for a mistake of the user.
        """
        check_options(given.options)
        try:
            return cls._of(given, read_yaml(preset_file(given.preset)))
        except (KeyError, TypeError, AttributeError) as error:
            got = f"{type(error).__name__}: {error}"
            raise ConfigError(f"a preset like small.yaml in {given.preset}", got, "correct it") from error

    @classmethod
    def _of(cls, given: argparse.Namespace, tree: Tree) -> Self:
        needed = {"launch", "jobs", "forwards", "evaluations", "seeds", "base", "schemes", "lrs"}
        needed |= {given.command} - {"accuracy"}
        if lacking := sorted(needed - set(tree)):
            raise ConfigError(f"{', '.join(lacking)} in the preset {given.preset}", "none", "see small.yaml")
        tree |= tree.get(given.command, {})
        tree["base"] = _base(merge(tree["base"], tree.get("config", {})), given)
        schemes = {name: scheme(name, part) for name, part in tree["schemes"].items()}
        lrs = {name: _rates(tree["lrs"].get(own.like, {}) | given.lrs, own) for name, own in schemes.items()}
        known = read_yaml(HERE / "methods.yaml")
        changed = tree.get("methods", {})
        chosen(list(changed), list(known), f"methods in the preset {given.preset}")
        known = merge(known, changed)
        chosen(list(given.lrs), list(known), "--lr")
        chosen([name for own in lrs.values() for name in own], list(known), f"lrs in the preset {given.preset}")
        with_lr = [name for name in known if any(name in own for own in lrs.values())]
        seeds = tuple(given.seeds if given.seeds is not None else tree["seeds"])
        forwards = given.forwards if given.forwards is not None else tree["forwards"]
        jobs = given.jobs if given.jobs is not None else tree["jobs"]
        if min(forwards, jobs, tree["evaluations"]) < 1 or len(set(seeds)) < len(seeds) or not seeds:
            got = f"forwards {forwards}, jobs {jobs}, seeds {list(seeds)}"
            raise ConfigError(
                "--forwards, --jobs and evaluations of at least 1 and different --seeds", got, "correct them"
            )
        aside = set(tree.get("only_named", ())) - set(given.lrs)
        methods = chosen(given.methods or [name for name in with_lr if name not in aside], with_lr, "--methods")
        own_schemes = chosen(given.schemes, list(schemes), "--schemes")
        if "vary" in tree:
            tree["lr"] = varied_lr(tree, methods, own_schemes, given.lrs)
        return cls(
            tree=tree,
            methods={name: known[name] for name in methods},
            schemes={name: schemes[name] for name in own_schemes},
            lrs=lrs, seeds=seeds, forwards=forwards, jobs=jobs, out=given.out, options=tuple(given.options),
            launch=tuple((given.launch or tree["launch"]).split()),
        )  # fmt: skip

    def cells(self, scheme: str, method: str, seeds: Sequence[int], lrs: Sequence[float]) -> list[Cell]:
        """Runs with the same number of forward equivalents as all others."""
        return [self.cell(scheme, method, lr, seed) for seed in seeds for lr in lrs]

    def cell(self, scheme: str, method: str, lr: float, seed: int, options: Sequence[str] = ()) -> Cell:
        """One run, with a study's own `key=value` options.

        Raises:
            ConfigError: if its configuration is none, or its budget is less than a step.
        """
        tree = self._tree(scheme, method, lr, seed)
        config = parse([*self.options, *options], TABLES, DEFAULTS, command="launch/reproduce.py", base=tree)
        check_scheme(scheme, tree, config.adapter)
        steps = self.tree.get("steps") or self.forwards // cost_of_step(config)
        if steps < 1:
            got = f"{self.forwards} where a step takes {cost_of_step(config)}"
            raise ConfigError(f"--forwards of a step of {method} at least", got, "raise it")
        every = -(-steps // self.tree["evaluations"])  # the last step is evaluated, too: rounded down, one more is
        train = replace(config.train, steps=steps, eval_every=every, log_every=min(config.train.log_every, every))
        return Cell(scheme, method, replace(config, train=train))

    def _tree(self, scheme: str, method: str, lr: float, seed: int) -> Tree:
        own = self.schemes[scheme]
        tree = merge(merge(self.tree["base"], own.config), self.methods[method]["config"])
        company = TABLES["optimizer"][tree["optimizer"]["name"]].goes_with
        estimator = tree.get("estimator", {}).get("name", company.estimator)
        if "tau" in fields_of(TABLES["estimator"][estimator], keyword_only=True):
            tree = merge(tree, {"estimator": {"tau": own.tau}})
        where = {"name": f"{scheme}-{method}", "output_dir": str(self.out / "runs"), "seed": seed}
        tracking = {"tracking": {"experiment": self.out.name}}
        return merge(merge(tree, {"optimizer": {"lr": lr}}), where | tracking)


def cost_of_step(config: RunConfig) -> int:
    """Forward equivalents of a step: losses of the batch, and backward passes."""
    estimator: Estimator = build(config.estimator, TABLES["estimator"])
    trials: int = TABLES["optimizer"][config.optimizer.name].num_trials
    return forward_equivalents(estimator.num_candidates + trials - estimator.num_backwards, estimator.num_backwards)


def select_by(config: RunConfig) -> str:
    """The metric that chooses between weights, and here between learning rates."""
    return examined(config, build(config.task, TABLES["task"])).select_by


def preset_file(name: str) -> Path:
    """A shipped preset by its name, or a file of the user's.

    Raises:
        ConfigError: if there is none.
    """
    for path in (PRESETS / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
    raise ConfigError(f"--preset {names}, or a YAML file", name, "correct it")


def scheme(name: str, part: Tree) -> Scheme:
    """From a preset."""
    without = tuple(part.get("without", ()))
    return Scheme(part["title"], float(part["tau"]), part["config"], part.get("like", name), without)


def chosen(wanted: Sequence[str] | None, known: Sequence[str], option: str) -> list[str]:
    """Those wanted, in the order of those known; all of them if none is named.

    Raises:
        ConfigError: if one is not known.
    """
    for name in wanted or ():
        if name not in known:
            remedy = "correct it; what the preset has no learning rates for needs --lr METHOD=LR[,LR...]"
            raise ConfigError(f"{option} of {', '.join(known)}", name, remedy)
    return [name for name in known if wanted is None or name in wanted]


def merge(a: Mapping[str, Any], b: Mapping[str, Any]) -> Tree:
    """`b` over `a`, mappings within mappings too."""
    both = {key: merge(a[key], b[key]) for key in a if isinstance(a[key], dict) and isinstance(b.get(key), dict)}
    return {**a, **b, **both}


def _rates(lrs: Mapping[str, list[float]], own: Scheme) -> dict[str, list[float]]:
    return {method: values for method, values in lrs.items() if method not in own.without}


def _base(base: Tree, given: argparse.Namespace) -> Tree:
    """With the command line's model and task."""
    if given.model is not None:
        base = merge(base, {"model": {"id": given.model, "config": None, "tokenizer": None}})
    if given.task is not None:
        base = base | {"task": {"name": given.task}}
    if given.data is not None:
        base = merge(base, {"task": {"path": given.data}})
    return base
