"""How tensor-parallel ranks share a model's layers: transformers' own plan, or ours for families it has none for."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from raytx.components import TensorPlan, TensorStyle
from raytx.errors import RecipeError
from raytx_hf.pieces import family, plain

INSTEAD = "fsdp and ZeRO spread it"
COLUMN, ROW, HEADS, SHARED = (TensorStyle(kind) for kind in ("column", "row", "heads", "shared"))
GATHERED = TensorStyle("column", gather=True)

STYLES: Mapping[str, TensorStyle | None] = {
    "colwise": COLUMN,
    "rowwise": ROW,
    "packed_colwise": TensorStyle("column", blocks=2),
    "replicated_with_grad_allreduce": SHARED,
    "colwise_gather_output": GATHERED,
    "colwise_rep": GATHERED,
    "rowwise_split_input": None,
    "rowwise_rep": None,
    "embedding_rowwise": None,
    "replicate": None,
}
"""transformers' styles in ours. None stays whole on every rank: an embedding, and a row layer whose input is whole."""


@dataclass(frozen=True)
class Table:
    """A family's plan: styles and divided attributes by regular expressions of names under the base model."""

    layers: Mapping[str, TensorStyle]
    divided: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


CONV1D = {"transposed": True}  # GPT-2's linear layers are (inputs, outputs)
BERT = Table(
    {
        r"encoder\.layer\.\d+\.attention\.self\.(query|key|value)": COLUMN,
        r"encoder\.layer\.\d+\.attention\.output\.dense": ROW,
        r"encoder\.layer\.\d+\.intermediate\.dense": COLUMN,
        r"encoder\.layer\.\d+\.output\.dense": ROW,
    }
)
T5 = Table(
    {
        r"(en|de)coder\.block\.\d+\.layer\.\d+\.(SelfAttention|EncDecAttention)\.[qkv]": COLUMN,
        r"(en|de)coder\.block\.\d+\.layer\.\d+\.(SelfAttention|EncDecAttention)\.o": ROW,
        r"(en|de)coder\.block\.\d+\.layer\.\d+\.SelfAttention\.relative_attention_bias": HEADS,
        r"(en|de)coder\.block\.\d+\.layer\.\d+\.DenseReluDense\.wi(_[01])?": COLUMN,
        r"(en|de)coder\.block\.\d+\.layer\.\d+\.DenseReluDense\.wo": ROW,
    },
    {r"(en|de)coder\.block\.\d+\.layer\.\d+\.(SelfAttention|EncDecAttention)": ("n_heads", "inner_dim")},
)
TABLES: Mapping[str, Table] = {
    "gpt2": Table(
        {
            r"h\.\d+\.attn\.c_attn": TensorStyle("column", blocks=3, **CONV1D),
            r"h\.\d+\.attn\.c_proj": TensorStyle("row", **CONV1D),
            r"h\.\d+\.mlp\.c_fc": TensorStyle("column", **CONV1D),
            r"h\.\d+\.mlp\.c_proj": TensorStyle("row", **CONV1D),
        },
        {r"h\.\d+\.attn": ("split_size", "num_heads")},
    ),
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "camembert": BERT,
    "electra": BERT,
    "distilbert": Table(
        {
            r"transformer\.layer\.\d+\.attention\.[qkv]_lin": COLUMN,
            r"transformer\.layer\.\d+\.attention\.out_lin": ROW,
            r"transformer\.layer\.\d+\.ffn\.lin1": COLUMN,
            r"transformer\.layer\.\d+\.ffn\.lin2": ROW,
        }
    ),
    "t5": T5,
    "mt5": T5,
    # transformers exchanges what both of its packed layers put out; gate and up need not be, cut each by itself.
    "phi3": Table(
        {
            r"layers\.\d+\.self_attn\.qkv_proj": GATHERED,
            r"layers\.\d+\.mlp\.gate_up_proj": TensorStyle("column", blocks=2),
            r"layers\.\d+\.mlp\.down_proj": ROW,
        }
    ),
}
"""By model_type. They go before transformers' own plans."""


def plan_of(module: nn.Module) -> TensorPlan:
    """Return the plan of a structure, adapters included; raise RecipeError where the family has none that we carry."""
    table = _table(plain(module))
    if isinstance(table, str):
        raise RecipeError(f"model: {family(module)!r} cannot be cut over tensor-parallel ranks: {table}")
    layers: dict[str, TensorStyle] = {}
    divided: dict[str, tuple[str, ...]] = {}
    tied = _tied(module)
    for name, layer in module.named_modules():
        own = _name_in_family(name, module)
        style = _found(table.layers, own)
        if style and not (style.gather and (_weight(layer) is None or _weight(layer) in tied)):
            layers |= _adapted(name, layer, style)
        if attributes := _found(table.divided, own):
            divided[name] = attributes
    return TensorPlan(layers, divided)


def limit(module: nn.Module) -> tuple[int, str]:
    """Return the number that tensor-parallel sizes must divide, and why there is none above 1; "" where there is."""
    table = _table(plain(module))
    if isinstance(table, str):
        return 1, table
    lengths = _lengths(module)
    most = math.gcd(*lengths.values())
    if most > 1:
        return most, ""
    told = ", ".join(f"{what} {length}" for what, length in lengths.items())
    return 1, f"nothing divides all of its parts: {told}"


# ----------------------------------------------------------------------------------------------------------- tables


def _table(whole: Any) -> Table | str:
    """Return a model's table, of names in the whole model, or why it has none, as a clause about "it"."""
    prefix = f"{whole.base_model_prefix}\\."
    if table := TABLES.get(whole.config.model_type):
        rooted = {f"{prefix}{pattern}": style for pattern, style in table.layers.items()}
        return Table(
            rooted | {"lm_head": GATHERED}, {f"{prefix}{pattern}": names for pattern, names in table.divided.items()}
        )
    return _translated(whole)


def _translated(whole: Any) -> Table | str:
    """Return transformers' plan as a table, or why it cannot be followed."""
    told = whole.tp_plan
    if not any(style in ("colwise", "packed_colwise") for style in told.values()):
        return f"transformers has no tensor-parallel plan for it, and neither has raytx; {INSTEAD}"
    if strange := next(((name, style) for name, style in told.items() if style not in STYLES), None):
        return f"its {strange[0]} are shared as {strange[1]!r}, which raytx cannot do; {INSTEAD}"
    translated = {_pattern(name): STYLES[style] for name, style in told.items()}
    table = Table({pattern: style for pattern, style in translated.items() if style is not None})
    if forgotten := _forgotten(whole, table):
        return f"transformers' plan for it leaves out {forgotten}, which sees one rank's heads; {INSTEAD}"
    return table


def _forgotten(whole: nn.Module, table: Table) -> str:
    """Return a module that works beside a cut layer, within its parent, and has parameters but no style.

    Phi's optional norms of queries and keys are such: each rank would train them on its own heads alone.
    """
    for name, parent in whole.named_modules():
        styles = {f"{name}.{child}": _found(table.layers, f"{name}.{child}") for child, _ in parent.named_children()}
        if any(style == COLUMN for style in styles.values()):
            for child, style in styles.items():
                if style is None and next(whole.get_submodule(child).parameters(), None) is not None:
                    return child
    return ""


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\*", r"\d+")


def _found(table: Mapping[str, Any], name: str) -> Any:
    return next((value for pattern, value in table.items() if re.fullmatch(pattern, name)), None)


def _tied(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters with more than one owner: cutting a head would cut the embedding."""
    owners = Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in owners.items() if count > 1}


def _weight(layer: Any) -> nn.Parameter | None:
    """Return a layer's own weight; RoBERTa's head is several layers, and has none."""
    return getattr(getattr(layer, "base_layer", layer), "weight", None)


# --------------------------------------------------------------------------------------------------------- adapters


def _name_in_family(name: str, module: nn.Module) -> str:
    return name.removeprefix("base_model.model.") if module is not plain(module) else name


def _adapted(name: str, layer: nn.Module, style: TensorStyle) -> dict[str, TensorStyle]:
    """Return the styles of a layer, or of the base and the adapters inside one that peft has wrapped.

    What is narrow stays whole: a column layer's adapter is cut behind the bottleneck, a row layer's before it.
    """
    if hasattr(layer, "modules_to_save"):
        copies = ("original_module", *(f"modules_to_save.{key}" for key in layer.modules_to_save))
        return {f"{name}.{copy}": style for copy in copies}
    if not hasattr(layer, "base_layer"):
        return {name: style}
    side = {"column": "lora_B", "row": "lora_A"}.get(style.kind)
    linear = TensorStyle(style.kind, blocks=style.blocks, gather=style.gather)  # an adapter lies the usual way round
    cut = {f"{name}.{side}.{key}": linear for key in getattr(layer, side)} if side else {}
    return {f"{name}.base_layer": style} | cut


# ----------------------------------------------------------------------------------------------------------- limits


def _lengths(module: nn.Module) -> dict[str, int]:
    """Return everything that must divide: heads, and the widths of layers that are cut and stay so."""
    text = plain(module).config.get_text_config()
    heads = {"attention heads": text.num_attention_heads, "key/value heads": _key_value_heads(text)}
    return {what: count for what, count in heads.items() if count} | dict(_widths(module))


def _key_value_heads(text: Any) -> int | None:
    return getattr(text, "num_key_value_heads", None)


def _widths(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the width of each kind of layer once. A head that is gathered stays whole where it does not divide."""
    for name, style in plan_of(module).layers.items():
        if style.kind == "shared" or style.gather:
            continue
        shape = module.get_submodule(name).weight.shape
        dim = {"column": 0, "row": 1, "heads": 1}[style.kind]
        yield f"width of {name.rpartition('.')[2]}", shape[1 - dim if style.transposed else dim] // style.blocks
