"""The verbs that Lightning runs: LightningCLI with layers of YAML, chained stages and an output folder."""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from pydoc import locate
from typing import Any, Literal

import lightning
import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import Callback, Checkpoint, LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import nn

from aligntok import preemption
from aligntok.callbacks import ProgressBar, RunRecord, SaveCheckpoint
from aligntok.callbacks.checkpoint_io import AtomicCheckpointIO
from aligntok.callbacks.progress import MetricsCSV
from aligntok.errors import UserError, check, check_nonnegative, check_positive, shortened, words_of
from aligntok.files import check_writable, locked, write_text
from aligntok.layers import read_command, to_text
from aligntok.messages import LONGEST, HelpFormatter, ShortErrors, building
from aligntok.networks import checkpoint_blocks, compile_blocks
from aligntok.programs.fabric import check_nodes
from aligntok.programs.repair import refuse_writers
from aligntok.references import followed
from aligntok.stages import Stage
from aligntok.stages.supported import check_precision, check_strategy
from aligntok.stages.tokenizer_stage import tokenizer_is_loaded
from aligntok.weights.checkpoint import read_checkpoint

VERBS = {
    "fit": "Train a stage. Ends at trainer.max_steps; --ckpt_path last goes on with a run that was cut off.",
    "validate": "Measure a checkpoint on the validation images; writes validate.json into --output.",
    "test": "Measure a checkpoint on the test images (data.test, by default the validation images).",
    "predict": "Run a stage's predict_step over data.predict with a checkpoint.",
}


NONNEGATIVE = ("gradient_clip_val", "log_every_n_steps", "min_steps", "min_epochs")  # Lightning takes any number


class RunCLI(LightningCLI):
    """LightningCLI with an output folder, ``--init_from``, and nothing silent."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the verb that runs: a parser takes a tenth of a second to make."""
        verb = sys.argv[1]
        return {verb: LightningCLI.subcommands()[verb]}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with ExitStack() as self.held:  # the lock of the output folder
            super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser."""
        kwargs = {"dump_header": [f"aligntok, lightning=={lightning.__version__}"], "allow_abbrev": False, **kwargs}
        return super().init_parser(**kwargs, parser_mode="omegaconf+")  # values of other keys: ${data.init_args.x}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, its configs merged into one."""
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)  # a config's root is its verb's
        with building(), followed():
            self.config = parser.parse_args(merge_layers(sys.argv[1:]))
        seed = self.config[self.config.subcommand].seed_everything
        check(0 <= seed < 2**32, f"seed_everything={seed}: give a whole number from 0 to 2^32 - 1")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what Lightning lacks."""
        add = parser.add_argument
        add("--output", type=str, default="runs/default", help="Folder of the run: checkpoints, curves, images.")
        about = "Checkpoint of the previous stage, whose weights (the average, if it has one) this stage starts from."
        add("--init_from", type=str | None, help=about)
        about = "Decay of the average to measure, of those that the run kept; 0: the raw weights. Not in fit."
        add("--ema", type=float | None, help=about)
        about = "Compile the blocks of all networks with torch.compile: a minute at the start, then faster on a GPU."
        add("--compile", type=bool, default=False, help=about)
        about = "Recompute the blocks of all networks that train in the backward pass: less memory, a third more work."
        add("--gradient_checkpointing", type=bool, default=False, help=about)
        about = "Products of float32 matrices on a GPU: highest is float32; high, TF32, is several times faster."
        add("--float32_matmul", type=Literal["highest", "high", "medium"] | None, default=None, help=about)
        about = "Callbacks by name; null removes one. In a list, without names: trainer.callbacks."
        add("--callbacks", type=dict[str, Callback | None], default={}, help=about)
        about = "Minutes that processes wait for one that hangs, before the run ends and names it."
        add("--timeout", type=float, default=10.0, help=about)
        parser.link_arguments("output", "trainer.default_root_dir")

    def _parse_ckpt_path(self) -> None:  # private: LightningCLI has no switch for it
        """Do not let a checkpoint's hyperparameters overrule command line and YAML."""

    def instantiate_classes(self) -> None:
        """Build data, model and trainer."""
        with building():
            super().instantiate_classes()

    def before_instantiate_classes(self) -> None:
        """Name the checkpoint, and say what is wrong with it before anything is built."""
        config = self.config[self.subcommand]
        check(
            config.trainer.accelerator != "gpu" or CUDAAccelerator.is_available() or MPSAccelerator.is_available(),
            "trainer.accelerator gpu: torch finds no GPU here. Add --config run/cpu.yaml to take the CPU, which is for"
            " small sizes, or --config run/debug.yaml to try two steps",
        )
        check_nodes(config.trainer.num_nodes)
        check_strategy(config.trainer.strategy)
        if issubclass(locate(config.model.class_path), Stage):  # type: ignore[arg-type]  # the parser has found it
            check_precision(config.trainer.precision, fit=self.subcommand == "fit")
        config.weights_only = True  # AtomicCheckpointIO reads nothing else; said here, Lightning does not warn
        last = Path(config.output) / "checkpoints" / "last.ckpt"
        for key in ("ckpt_path", "init_from"):
            check(config[key] != "", f"--{key} is empty: name a checkpoint, or leave it out")
        if self.subcommand == "fit":
            if not config.trainer.fast_dev_run:
                rank_zero_only(self.held.enter_context)(locked(config.output))
            self.check_start(config, last)
        elif config.ckpt_path == "last":
            config.ckpt_path = str(last)
            check(last.exists(), f"--ckpt_path last: there is no {last}. Name a checkpoint, or its --output")
        else:
            words = f"aligntok {self.subcommand} needs the weights: --ckpt_path CHECKPOINT"
            check(bool(config.ckpt_path or config.init_from or tokenizer_is_loaded(config.model)), words)
        if self.subcommand in ("validate", "test"):
            check_writable(Path(config.output) / f"{self.subcommand}.json")
        if config.ckpt_path:
            read_checkpoint(config.ckpt_path, ema=config.ema, weights=False)

    def check_start(self, config: Namespace, last: Path) -> None:
        """Resolve ``--ckpt_path last``, and refuse to write over another run or to start a stage from nothing."""
        check(config.ema is None, "--ema is of validate, test and predict: fit goes on with all weights that it kept")
        if config.ckpt_path is None and preemption.was_requeued():
            config.ckpt_path = "last"
        check(
            config.ckpt_path is not None or not last.exists(),
            f"{config.output} already holds a run: go on with it by --ckpt_path last, or give another --output",
        )
        if config.ckpt_path == "last":
            config.ckpt_path = str(last) if last.exists() else None
            if config.ckpt_path is None:
                print(f"--ckpt_path last: no {last} yet, the run starts from the beginning", flush=True)
        for left in Path(config.output).glob("hpc_ckpt_*") if config.ckpt_path is None else ():
            raise UserError(
                f"{left} is of Lightning's own requeueing, which may save in the middle of a step: go on with it by"
                " --ckpt_path, or move it away to start from the beginning"
            )
        stage: Any = locate(config.model.class_path)
        given = config.ckpt_path or config.init_from or tokenizer_is_loaded(config.model)
        if getattr(stage, "needs_previous", False) and not given:
            raise UserError(f"{stage.__name__} starts from a previous stage: add --init_from CHECKPOINT of that stage")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Give the trainer the named callbacks (in any order), our checkpoint writer and the run's loggers."""
        config = self.config_init[self.subcommand]
        trainer, output = config.trainer, config.output
        plugins = trainer.plugins if isinstance(trainer.plugins, list) else [trainer.plugins]
        given = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        loggers: list[Logger] = [logger for logger in given if isinstance(logger, Logger)]  # of W&B, MLflow, ...
        if self.subcommand == "fit" and not trainer.fast_dev_run and trainer.logger is not False:
            loggers = [TensorBoardLogger(output, name="", version=""), MetricsCSV(output), *loggers]
        listed = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
        callbacks = [callback for callback in (*config.callbacks.values(), *listed) if callback is not None]
        saves = self.subcommand == "fit" and trainer.enable_checkpointing is not False
        if not saves:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        elif not any(isinstance(callback, Checkpoint) for callback in callbacks):
            callbacks.append(SaveCheckpoint())
        if not loggers:
            callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
        if trainer.enable_progress_bar is not False and not any(isinstance(c, TQDMProgressBar) for c in callbacks):
            callbacks.append(ProgressBar())
        callbacks += (
            [ChangeBlocks("gradient_checkpointing", checkpoint_blocks)] if config.gradient_checkpointing else []
        )
        callbacks += [ChangeBlocks("compile", compile_blocks)] if config.compile else []
        kwargs |= {"logger": loggers, "enable_checkpointing": saves, "callbacks": [*callbacks, RunRecord()]}
        check(0 < config.timeout < math.inf, f"timeout={config.timeout}: give minutes, more than 0")
        check_positive(accumulate_grad_batches=trainer.accumulate_grad_batches)
        check_nonnegative(**{name: trainer[name] for name in NONNEGATIVE})
        check(
            trainer.val_check_interval != 0,
            "val_check_interval=0: give steps, or limit_val_batches 0 for no validation",
        )
        check(
            self.subcommand != "fit"
            or bool(trainer.max_time or trainer.fast_dev_run)
            or (trainer.max_steps, trainer.max_epochs) != (-1, -1),
            "trainer.max_steps=-1: the run would never end. Give steps, trainer.max_epochs or trainer.max_time",
        )
        try:
            made = super().instantiate_trainer(
                plugins=[*filter(None, plugins), AtomicCheckpointIO(config.ema)], **kwargs
            )
        except Exception as error:
            raise UserError(about_trainer(error, {**trainer})) from error
        if isinstance(trainer.strategy, str) and hasattr(made.strategy, "_timeout"):
            made.strategy._timeout = timedelta(minutes=config.timeout)  # private: of what a name stands for
        if not any(isinstance(callback, SaveCheckpoint) for callback in callbacks):
            preemption.stop_listening()  # nothing could be saved
            made._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]  # private: these would wait for other ranks
        return made

    def _run_subcommand(self, subcommand: str) -> None:  # private: LightningCLI does all within its constructor
        """Run the verb; what Lightning has against the trainer's arguments is a line."""
        try:
            super()._run_subcommand(subcommand)
        except MisconfigurationException as error:
            raise UserError(about_trainer(error, {**self.config[subcommand].trainer})) from error

    def after_instantiate_classes(self) -> None:
        """Say how float32 is multiplied, and take the previous stage's weights."""
        config = self.config[self.subcommand]
        if config.float32_matmul:
            torch.set_float32_matmul_precision(config.float32_matmul)
        if config.init_from and not config.get("ckpt_path"):
            if not isinstance(self.model, Stage):
                raise UserError(f"--init_from has no effect on {type(self.model).__name__}: it is no stage of aligntok")
            self.model.init_from(config.init_from)

    def after_fit(self) -> None:
        """Measure the last step, where a signal ended the attempt that was to do it."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        for record in (callback for callback in callbacks if isinstance(callback, RunRecord)):
            if record.is_missing(self.trainer):
                last = self.config[self.subcommand].ckpt_path
                self.trainer.validate(self.model, datamodule=self.datamodule, ckpt_path=last, verbose=False)
                record.write(self.trainer, self.model)

    def after_validate(self) -> None:
        """Write what was measured to ``validate.json`` or ``test.json`` in the output folder."""
        if self.trainer.is_global_zero:
            config = self.config[self.subcommand]
            values = {name: round(float(value), 6) for name, value in sorted(self.trainer.callback_metrics.items())}
            record = {"checkpoint": config.ckpt_path, "metrics": values}
            callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
            conditions = [c.conditions for c in callbacks if getattr(c, "conditions", "")]
            if conditions:
                record["conditions"] = conditions[0]
            write_text(Path(config.output) / f"{self.subcommand}.json", json.dumps(record, indent=1))

    after_test = after_validate


class PlannedRun(RunCLI):
    """A run as ``fit`` reads and builds it, on the meta device: without trainer, weights and output folder."""

    def before_instantiate_classes(self) -> None:
        """Leave aside what must be there when the run starts."""

    def instantiate_classes(self) -> None:
        """Build data, model and callbacks."""
        with building(), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's: that no weight is copied
            self.config_init = self.parser.instantiate_classes(self.config)
        self.model, self.datamodule = (self._get(self.config_init, key) for key in ("model", "data"))

    def after_instantiate_classes(self) -> None:
        """Take no weights."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder; an earlier attempt's becomes ``config.1.yaml`` and so on."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write it when the work starts."""
        if stage != "fit":
            return
        folder = Path(trainer.default_root_dir)
        path = folder / "config.yaml"
        if trainer.is_global_zero and not self.already_saved:
            text = self.parser.dump(self.config, skip_unset=False)
            if path.is_file() and path.read_text() != text:
                path.rename(folder / f"config.{len(list(folder.glob('config.*.yaml'))) + 1}.yaml")
            write_text(path, text)
        self.already_saved = True


class ChangeBlocks(pl.Callback):
    """Changes how the blocks of all networks compute, when training begins."""

    def __init__(self, option: str, change: Callable[[nn.Module], int]) -> None:
        self.option, self.change = option, change

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Change them, once the judges are built too."""
        if not self.change(pl_module):
            name = type(pl_module).__name__
            rank_zero_warn(f"--{self.option}: {name} has no block of a class with compiled_as_one, and stays as it is")


class Parser(ShortErrors, LightningArgumentParser):
    """Lightning's parser with short errors."""


def about_trainer(error: Exception, arguments: dict[str, Any]) -> str:
    """Return an error of Lightning's Trainer with its arguments that it is about: named in it, or failing alone.

    >>> about_trainer(ValueError("no such thing"), {"profiler": "abc", "max_steps": 3})
    'trainer.profiler=abc: no such thing'
    """
    defaults = inspect.signature(pl.Trainer).parameters
    given = {name: value for name, value in arguments.items() if value != defaults[name].default}
    words = words_of(error, LONGEST)
    about = [name for name in given if re.search(rf"\b{name}\b", words)]
    about = about or [name for name, value in given.items() if fails(partial(pl.Trainer, **{name: value}))]
    keys = ", ".join(f"trainer.{name}={shortened(str(given[name]), 40)}" for name in about)
    return shortened(f"{keys or 'trainer'}: {words}", LONGEST)


def fails(action: Callable[[], Any]) -> bool:
    """Whether it raises an error."""
    try:
        action()
    except Exception:
        return True
    return False


def run(args: list[str], kind: type[RunCLI] = RunCLI) -> RunCLI:
    """Parse and run one command, a verb and its options, or let another ``kind`` do with it what it does.

    Raises:
        UserError: What the user can mend.
    """
    sys.argv[1:] = args  # where processes that Lightning launches look for them
    if args[0] == "predict":
        refuse_writers(args[1:])
    return kind(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        seed_everything_default=0,
        parser_class=Parser,
        parser_kwargs={
            "formatter_class": HelpFormatter,
            args[0]: {"description": VERBS[args[0]]},
        },
        auto_configure_optimizers=False,
        trainer_defaults={"enable_model_summary": False},
    )


def run_verb(verb: str, arguments: list[str]) -> None:
    """Run a verb with the words that follow it."""
    run([verb, *arguments])


fit_command, validate_command, test_command, predict_command = (partial(run_verb, verb) for verb in VERBS)


def plan_command(arguments: list[str]) -> None:
    """Print what a run would take."""
    from aligntok.programs.needs import unwritten_files
    from aligntok.programs.plan import Plan, parse_plan, report

    options, words = parse_plan(arguments)
    with unwritten_files():
        run_ = run(["fit", *words], PlannedRun)
        config, callbacks = run_.config.fit, [*run_.config_init.fit.callbacks.values()]
        plan = Plan(run_.model, run_.datamodule, config, callbacks, options.gpus, options.nodes)
        report(plan, options.rate, options.check)


def merge_layers(arguments: list[str]) -> list[str]:
    """Return a command with all its configs as one, before the rest: the command line overrules YAML in any order."""
    verb, *words = arguments
    config, others = read_command(words)
    for value in (config, *(yaml.safe_load(word.partition("=")[2] or word) for word in others if "{" in word)):
        check_steps(value)
    return [verb, "--config", to_text(config), *others] if config else arguments


def check_steps(value: Any, key: str = "") -> None:
    """Raise a ``UserError`` where a key is a number that is not whole: jsonargparse would round the step."""
    items = value.items() if isinstance(value, dict) else ()
    for name, inner in items:
        check(not isinstance(name, float) or name.is_integer(), f"{key}: step {name}, give a whole number")
        check_steps(inner, f"{key}.{name}".lstrip("."))
