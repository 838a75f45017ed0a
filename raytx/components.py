"""The five kinds of component: the config a recipe holds, and the protocol that its build() must fulfil.

The config class is the component. Its docstring's first line is what `raytx plugins` prints, its described fields are
the schema, its `build()` imports the heavy body. Configs must import neither torch nor Ray: they are read by
`raytx --help`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from raytx.layout import Layout
from raytx.sections import Section
from raytx.tasks.base import Features, Row, Runner, Task

if TYPE_CHECKING:
    from raytx.plan import Plan
    from raytx.recipe import Recipe

KINDS = ("model", "data", "strategy", "compression", "export")
"""The kinds, in the order in which a run meets them."""

TaskClass = type[Task]
"""Named here because the fields of components are called `type`."""

Part = str
"""What a checkpoint keeps of one parameter: "weight" is its fp32 value, the others are the optimizer's state tensors by
torch's names (exp_avg, exp_avg_sq, momentum_buffer...)."""
Weights = Callable[[str], np.ndarray]
"""Reads one whole tensor of a module, a parameter or a buffer, by its Hugging Face name."""


class Component(Section):
    """What a plugin provides: a frozen config with a `type`, and a `build()` that imports the heavy body."""

    kind: ClassVar[str]
    type: str
    """Which component of its kind."""

    @property
    def provides(self) -> frozenset[str]:
        """Tags that other components of the recipe may rely on, such as "save_pretrained" or "generate"."""
        return frozenset()

    @property
    def requires(self) -> frozenset[str]:
        """Tags that some component of the recipe must provide, or the plan is refused."""
        return frozenset()

    @property
    def conflicts(self) -> Mapping[str, str]:
        """Tags that no component of the recipe may provide, each with the reason shown to the user."""
        return {}

    def build(self) -> Any:
        """Import the heavy body and return the object that fulfils the kind's protocol."""
        raise NotImplementedError

    def local_files(self) -> Iterable[tuple[str, str]]:
        """Yield (key, path) of files the recipe points at, so that they are checked before anything starts."""
        return ()


# --------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class ModelSize:
    """What the plan needs to know of a model, measured without allocating it."""

    parameters: int
    """All parameters, tied ones once."""
    trainable: int
    """Parameters that get a gradient."""
    layers: int
    hidden_size: int
    vocab_size: int
    """Width of the output, whose logits dominate activations of small decoders."""
    context_length: int | None = None
    """Positions the model has; None where it has no limit or tells none."""
    pieces: tuple[int, ...] = ()
    """Parameters of each piece that a pipeline can place, in order: embedding, layers, head."""
    not_pipelined: str = "it names no layers to cut it at"
    """Why a pipeline cannot cut it; empty where it can."""
    tensor_parallel: int = 1
    """Tensor-parallel sizes must divide this: the greatest common divisor of its head counts and widths."""
    not_tensor_parallel: str = "it has no tensor-parallel plan"
    """Why its layers cannot be cut over tensor-parallel ranks; empty where they can."""
    not_sliced: str = "what its layers do with a part of a sample is not known"
    """Why sequence-parallel ranks cannot have a slice of each sample; empty where only attention mixes places."""


@dataclass(frozen=True)
class TensorStyle:
    """How tensor-parallel ranks share one layer (Shoeybi et al. 2019)."""

    kind: Literal["column", "row", "heads", "shared"]
    """column: outputs are cut, the input's gradient is summed. row: inputs are cut, the output is summed and the bias
    added once. heads: a table with a column per head, such as relative position biases, is cut along its last
    dimension. shared: whole on every rank, but applied to that rank's part only, so its gradient is summed."""
    blocks: int = 1
    """column: projections that lie side by side in the output (query, key and value in one), each cut by itself."""
    transposed: bool = False
    """The weight is (inputs, outputs), as GPT-2's layers have it, instead of (outputs, inputs)."""
    gather: bool = False
    """column: ranks exchange their outputs, so that what follows sees them whole; for heads of a vocabulary."""


@dataclass(frozen=True)
class TensorPlan:
    """How a module's layers are cut over tensor-parallel ranks; what it does not name stays whole on every rank."""

    layers: Mapping[str, TensorStyle]
    """Style by module name, of modules that hold a weight themselves."""
    divided: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By module name, the integer attributes (heads, widths) that a rank's part has a share of."""


@dataclass(frozen=True)
class Piece:
    """One of the consecutive parts that a model is cut into for a pipeline."""

    module: Any
    """A torch module. forward(travel) takes a tuple (input ids or hidden states, *the features that travel along, None
    for those a batch does not have) and returns the same with new hidden states; the last piece returns logits alone.
    Within a stage a piece is handed what the one before it returned, unchanged: it may carry masks made once."""
    names: Mapping[str, str]
    """Hugging Face name of each of its parameters and buffers, by their names in `module`."""


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says of one tensor."""

    dtype: str
    """As safetensors spells it: F32, BF16, F16, I64..."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of a public directory that are made together, such as the experts that a model holds as one."""

    headers: Mapping[str, TensorHeader]
    """By the name that the directory's files give it."""
    make: Callable[[], Iterator[tuple[str, np.ndarray]]]
    """Yields each with its numbers, in that order; bfloat16, which numpy has not, as uint16 of the same bits."""


class ModelConfig(Component):
    """A model and its task."""

    kind: ClassVar[str] = "model"

    def distrusted(self) -> ModelConfig:
        """Return this component without what lets foreign code run, for when it was read from a file of others."""
        return self

    def task_class(self) -> TaskClass:
        """Return the task's class: its metrics, serving protocol and needed columns are known before any build."""
        raise NotImplementedError

    def size(self) -> ModelSize:
        """Count parameters on the meta device; raise RecipeError when the architecture cannot be built."""
        raise NotImplementedError

    def build(self) -> Model:
        raise NotImplementedError


class Model(Protocol):
    """What a model config builds."""

    def fingerprint(self) -> str:
        """Return a name that changes whenever local files do that the processor is made of; "" where there are none."""

    def fit(self, rows: Callable[[], Iterator[Row]], directory: Path, *, max_length: int) -> None:
        """Write the processor (tokenizer, labels) into a directory, learning from the training rows what it must."""

    def task(self, directory: Path) -> Task:
        """Return the task with the processor found in a directory (a prepared cache or an artifact)."""

    def module(self, directory: Path, *, seed: int = 0, activation_checkpointing: bool = False) -> Any:
        """Return the torch module with its starting weights, whole and on the CPU, as exporting needs it."""

    def structure(self, directory: Path, *, activation_checkpointing: bool = False) -> Any:
        """Return the torch module on the meta device: everything but its numbers. Frozen parameters need no grad."""

    def weights(self, directory: Path, *, seed: int = 0) -> Weights:
        """Return the reader of the structure's starting weights: of every parameter and buffer, also of those that no
        checkpoint holds.

        Each is read when it is asked for, so a rank reads no more than it keeps. Random ones are a function of seed and
        name: every rank starts alike, in any order of reading, and frozen ones are made again when a run is resumed or
        exported.
        """

    def tensor_plan(self, module: Any) -> TensorPlan:
        """Return how tensor-parallel ranks share the layers of a structure, adapters included."""

    def pieces(self, module: Any, travelling: Sequence[str]) -> list[Piece]:
        """Cut a structure into the pieces of a pipeline.

        `travelling` names the features besides input_ids that every piece needs, such as position_ids. The pieces hold
        the structure's own parameters and buffers: what is cut stands on the same (meta) tensors.
        """

    def merged(self, module: Any) -> Any:
        """Return the module in the form that is exported: adapters merged into the base, nothing else changed."""

    def consolidated(
        self,
        module: Any,
        tensors: Mapping[str, np.ndarray],
        weights: Weights,
        directory: Path,
        *,
        dtype: str,
        adapter_only: bool,
    ) -> list[TensorGroup]:
        """Return the public form of a structure's weights, each yet to be made: adapters merged, ties written once,
        names those of `save_pretrained`; or the adapters alone, as peft has them.

        `tensors` are a checkpoint's, `weights` reads what it does not hold. The directory holds the processor already;
        written into it is what is no weight: config, generation config, or the adapter's config.
        """

    def load(self, directory: Path) -> Any:
        """Return the module that `save_pretrained` wrote into an artifact directory, by a loader that runs no code."""

    def skeleton(self, directory: Path) -> Any:
        """Return the merged module's structure from an artifact directory, its weights yet to be loaded."""

    def assign(self, module: Any, tensors: Mapping[str, np.ndarray]) -> None:
        """Copy checkpoint weights, keyed by parameter name, into a module made by `module()`; every trained one."""

    def runner(self, module: Any) -> Runner:
        """Return the forward pass of a module for numpy features."""


# ---------------------------------------------------------------------------------------------------------- data


class DataConfig(Component):
    """A source of rows."""

    kind: ClassVar[str] = "data"

    def build(self) -> Source:
        raise NotImplementedError


class Source(Protocol):
    """What a data config builds. Rows are plain dicts; position is the index of a row, the same on every machine."""

    def fingerprint(self) -> str:
        """Return a name that changes whenever the rows may: of the bytes read and of the options."""

    def rows(self, split: Literal["train", "test"]) -> Iterator[Row]:
        """Yield the rows of a split in a fixed order; the test split may be empty."""

    def remarks(self) -> list[str]:
        """Return what the user should know of the rows once they were read, such as how many were skipped."""


# ------------------------------------------------------------------------------------------------------ strategy


@dataclass(frozen=True)
class Shares:
    """By how much a strategy divides what one rank holds of each component of memory."""

    parameters: int = 1
    gradients: int = 1
    optimizer: int = 1
    activations: int = 1


class StrategyConfig(Component):
    """How one training step spreads over the ranks."""

    kind: ClassVar[str] = "strategy"

    def layout(self, world_size: int) -> Layout:
        """Return the grid of ranks; raise RecipeError naming the number that does not divide."""
        return Layout(data_parallel_size=world_size)

    def refusal(self, recipe: Recipe) -> str | None:
        """Return why this strategy cannot carry out a recipe, or None; asked before anything is started."""
        return None

    def misfit(self, recipe: Recipe, layout: Layout, size: ModelSize) -> str | None:
        """Return why this strategy cannot spread a model over a layout, or None; asked when its size is known."""
        return None

    def stages(self, layout: Layout, size: ModelSize) -> tuple[tuple[int, int], ...]:
        """Return for each pipeline stage the pieces it holds, as [first, last); empty where there is no pipeline."""
        return ()

    def shares(self, layout: Layout) -> Shares:
        """Return the divisors of memory for a layout."""
        return Shares()

    def environment(self, *, use_gpu: bool) -> dict[str, str]:
        """Return environment variables that must be set in every worker before torch is imported."""
        return {}

    def engine_config(self, plan: Plan) -> dict[str, tuple[Any, str]]:
        """Return the library's own settings as {key: (value, origin)}, shown by `raytx plan`; empty when none."""
        return {}

    def build(self) -> Strategy:
        raise NotImplementedError


class Strategy(Protocol):
    """What a strategy config builds."""

    def engine(self, module: Any, *, model: Model, weights: Weights, plan: Plan, rank: int) -> Engine:
        """Take over a structure on the meta device: cut and shard it, give this rank's part its weights, and create the
        optimizer. A collective call.

        No rank needs to hold more than its part: a tensor is read whole, and what is not this rank's is let go.
        """


@dataclass(frozen=True)
class Microbatch:
    """The samples of one forward and backward pass on one rank."""

    features: dict[str, np.ndarray]
    """What the module's forward takes."""
    weight: float
    """This microbatch's share of the global batch's targets; the shares of all ranks add up to 1, so the global loss
    is the mean over targets, however many ranks there are. 0 marks the padding of a short last batch."""
    seed: int
    """Seeds dropout and whatever else a forward pass draws: an engine gives it to raytx.seeding before each. A function
    of seed, step and place in the global batch, so that it is the same on any number of ranks and needs no saving."""
    samples: tuple[int, ...] = ()
    """Which samples these are, by index in the prepared data; none where they only fill a short batch."""


class Engine(Protocol):
    """One rank's part in training. Methods marked collective are called by every rank, in the same order."""

    module: Any

    def train_batch(self, microbatches: list[Microbatch], *, lr: float) -> dict[str, float]:
        """Do one optimizer update. Return loss and grad_norm (before clipping), equal on all ranks. Collective.

        Where either is not finite it updates nothing, neither weights nor any state of the optimizer, on any rank.
        Under fp16 it returns loss_scale and skipped besides: a step whose gradients overflowed updates nothing and has
        a grad_norm of 0.
        """

    def eval_batch(self, microbatch: Microbatch, *, logits: bool) -> tuple[float, np.ndarray | None]:
        """Return the mean loss over the microbatch's targets and, where asked, float32 logits. Collective."""

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on every rank. Collective."""

    def tensors(self) -> Iterator[tuple[str, Part, np.ndarray | None]]:
        """Yield every trained tensor whole, as (Hugging Face name, part, array; weights are fp32). Collective.

        Each tensor comes as an array on exactly one rank, which writes it, and as None on the others.
        """

    def load_tensors(self, read: Callable[[str, Part], np.ndarray], *, step: int) -> None:
        """Take trained tensors from a reader of whole tensors, and the optimizer's step count. Collective."""

    def scalars(self) -> dict[str, float]:
        """Return the numbers besides tensors that the next step depends on, equal on all ranks: fp16's loss scale."""

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """Take what `scalars` returned, or nothing, where the checkpoint is of an engine that has none."""

    def barrier(self) -> None:
        """Wait for every rank. Collective."""

    def peak_memory(self) -> int:
        """Return this rank's peak device memory in bytes, or resident memory where there is no device."""


# --------------------------------------------------------------------------------------------------- compression


class CompressionConfig(Component):
    """A step that makes the model smaller, with the limits it must keep."""

    kind: ClassVar[str] = "compression"
    changes_training: ClassVar[bool] = False
    """Whether prepare() changes what is learned, so that a run cannot go on with another value of it."""
    max_relative_error: float | None = None
    """Largest allowed ||compressed - original|| / ||original|| of the golden logits; null measures and lets pass."""
    max_metric_loss: float | None = None
    """Largest allowed worsening of the evaluation metric, in the metric's own units; null measures and lets pass."""

    def build(self) -> Compressor:
        raise NotImplementedError


class Compressor(Protocol):
    """What a compression config builds. The words are torch.ao's."""

    def prepare(self, module: Any) -> Any:
        """Change the module before training (for distillation, pruning schedules, fake quantisation); return it."""

    def convert(self, module: Any) -> Any:
        """Change the trained module into its compressed form; return it."""

    def restore(self, module: Any) -> Any:
        """Give an uncompressed module the structure that convert leaves, ready to load its state dict; return it."""


# -------------------------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class Exportable:
    """What an exporter gets: everything about the model that the checkpoint knew."""

    model: Model
    module: Any
    task: Task
    samples: Features
    """A collated batch of real features (numpy), with padding in it; for tracing."""
    card: str
    """The model card (README.md) in Markdown with YAML front matter."""
    compressors: list[Compressor] = field(default_factory=list)


class ExportConfig(Component):
    """A public format."""

    kind: ClassVar[str] = "export"
    max_difference: float = 1e-4
    """Largest allowed absolute difference between the exported form's logits and the golden ones."""

    def judge(self, *, difference: float, relative_error: float) -> str | None:
        """Return why a form that differs so much from the golden logits is refused, or None when it is accepted.

        A format that rounds on purpose overrides this to judge by relative error, and says so in its fields.
        """
        if difference <= self.max_difference:
            return None
        return (
            f"its logits differ by {difference:.2e} from the golden ones, max_difference is {self.max_difference:.0e}"
        )

    def build(self) -> Exporter:
        raise NotImplementedError


class Exporter(Protocol):
    """What an export config builds."""

    def save(self, exportable: Exportable, directory: Path) -> None:
        """Write the format's files into an empty directory, processor and card included."""

    def load(self, directory: Path, model: Model, compressors: list[Compressor]) -> Runner:
        """Return the forward pass of the saved form, from the directory alone, by loaders that run no code."""
