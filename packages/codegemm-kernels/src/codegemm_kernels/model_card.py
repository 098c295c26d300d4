"""The model card of a checkpoint folder: what the model is, how to load it, what was measured.

All exporters write it. Everything in it is read from the finished folder and the card of the model it was made from.
"""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from codegemm_kernels.checkpoint import (
    PARTS,
    CheckpointMetadata,
    TensorHeader,
    checkpoint_files,
    quantized_names,
    read_config,
    read_headers,
)
from codegemm_kernels.errors import BadInput
from codegemm_kernels.scheme import CODES_PER_WORD, CodebookScheme

CARD_FILE, REPORT_FILE = "README.md", "quantization_report.json"
_HUB_FOLDER = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")
_QUANTIZED = "quantized"
_TEMPLATE = """\
---
{front_matter}
---

# {name}

{architecture} in which {layers} linear layers are stored as indices into small codebooks and run without rebuilding
their weights ([CodeGEMM](https://arxiv.org/abs/2512.17970)). Made from {base} by codegemm {version}.

| | |
|---|---|
| base model | {base} |
| scheme | {scheme} |
| bits a weight | {bits:.3f} in the quantised layers, codebooks and scales included |
| size | {total}: {quantized} in the quantised layers, {rest} of embeddings, norms and what else is dense |
| the same with 16-bit weights | {dense} |
| versions | codegemm {version}, torch {torch}, transformers {transformers} |

## Load it

    pip install codegemm-runtime

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Or from the command line: `codegemm-runtime generate {name} --prompt "Once upon a time"`.

## Quality

{quality}

## Licence

{licence}
"""


def write_model_card(folder: Path, name: str, source: str, source_card: str | None = None) -> None:
    """Write README.md into the finished quantised checkpoint in `folder`.

    name: what the folder will be called; source: folder or hub name of the model it was made from; source_card: text of
    that model's card, by default the README.md in `source` if that is a folder. The card says "not measured" where
    `folder` has no quantization_report.json.
    """
    config = read_config(folder)
    metadata = CheckpointMetadata.from_config(config)
    if metadata is None:
        raise BadInput(f"{folder} is not quantised: only quantised checkpoints get a model card")
    if source_card is None and source and (Path(source) / CARD_FILE).is_file():
        source_card = (Path(source) / CARD_FILE).read_text(encoding="utf-8", errors="replace")
    told = _front_matter(source_card or "")
    base = _name_of(source)
    if told.get("base_model_relation") == _QUANTIZED:
        base = told.get("base_model", base)
    headers = read_headers(checkpoint_files(folder))
    text = _TEMPLATE.format(
        name=name,
        base=f"[{base}](https://huggingface.co/{base})" if "/" in base else base,
        front_matter="\n".join(_metadata_lines(base, told)),
        architecture=next(iter(config.get("architectures") or ["A language model"])),
        version=_version(),
        scheme=_describe(metadata),
        torch=torch.__version__,
        transformers=config.get("transformers_version", "unknown"),
        quality=_quality(folder, name, base),
        licence=_licence(base, told),
        **_sizes(headers),
    )
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _front_matter(card: str) -> dict[str, str]:
    """`key: value` pairs of a card's YAML header; of a list the first item. Enough for names and licences."""
    match = re.match(r"---\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    found: dict[str, str] = {}
    for key, value, item in re.findall(r"^(\w+):[ \t]*(.*)$(?:\n- *(.+)$)?", match[1] if match else "", re.MULTILINE):
        told = value.split(" #")[0].strip() or item.strip()
        found[key] = told.strip("'\"")
    return found


def _name_of(source: str) -> str:
    """Hub name of what `source` is a download of; otherwise the folder's own name, as paths are nobody's business."""
    path = Path(source)
    if not source or not path.is_dir():
        return source or "a model that was given in memory"
    hub = _HUB_FOLDER.search(f"{path.resolve().as_posix()}/")
    return f"{hub[1]}/{hub[2]}" if hub else path.resolve().name


def _metadata_lines(base: str, told: dict[str, str]) -> list[str]:
    local = "" if "/" in base else "  # a local folder: put the hub name here before publishing"
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"base_model: {json.dumps(base)}{local}", f"base_model_relation: {_QUANTIZED}"]
    lines += [f"{key}: {json.dumps(told[key])}" for key in ("license", "license_name", "license_link") if told.get(key)]
    return [*lines, "tags:", "- codegemm"]


def _version() -> str:
    try:
        return version("codegemm-kernels")
    except PackageNotFoundError:
        return "from a source tree"


def _describe(metadata: CheckpointMetadata) -> str:
    if metadata.layers:
        schemes = sorted({str(scheme) for scheme in metadata.layers.values()} | {str(metadata.scheme)})
        return f"by layer: {', '.join(schemes)} (see `config.json`)"
    scheme: CodebookScheme = metadata.scheme
    span = "each row" if scheme.group_size == -1 else f"{scheme.group_size} weights of a row"
    books = "1 codebook" if scheme.num_codebooks == 1 else f"{scheme.num_codebooks} codebooks"
    return f"{scheme}: {books} of 256 vectors of {scheme.vector_length} weights, a scale for {span}"


def _sizes(headers: dict[str, TensorHeader]) -> dict[str, Any]:
    """Bytes of the folder's tensors by what they are, for the template."""
    names = quantized_names(headers)
    total = sum(header.nbytes for header in headers.values())
    quantized = sum(headers[f"{name}.{part}"].nbytes for name in names for part in PARTS)
    weights = 0
    for name in names:
        _, words, out_features = headers[f"{name}.codes"].shape
        weights += words * CODES_PER_WORD * headers[f"{name}.codebooks"].shape[2] * out_features
    return {
        "layers": len(names),
        "bits": 8 * quantized / weights,
        "total": _megabytes(total),
        "quantized": _megabytes(quantized),
        "rest": _megabytes(total - quantized),
        "dense": _megabytes(total - quantized + 2 * weights),
    }


def _megabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _quality(folder: Path, name: str, base: str) -> str:
    """What quantization_report.json knows, and how to measure more."""
    command = f"    codegemm-eval ppl {name} --data wikitext2 --teacher {base}"
    report = folder / REPORT_FILE
    told = json.loads(report.read_text()) if report.is_file() else {}
    rows = []
    for key, what in (("divergence", "KL divergence from the base model's predictions"), ("perplexity", "perplexity")):
        if value := told.get(key):
            rows.append(f"| {what} | {value['before']:.4f} | {value['after']:.4f} |")
    if not rows:
        return f"Not measured when this was written. To measure:\n\n{command}"
    where = told.get("measured_on", "the calibration windows")
    table = "\n".join(["| | before tuning | now |", "|---|---|---|", *rows])
    return f"Measured by the run that made it, on {where}:\n\n{table}\n\nOn a text of your own:\n\n{command}"


def _licence(base: str, told: dict[str, str]) -> str:
    if not told.get("license"):
        return f"That of the base model, {base}. Its card was not at hand: look there before you publish this."
    named = told.get("license_name") or told["license"]
    link = f" ({told['license_link']})" if told.get("license_link") else ""
    return f"That of the base model, {base}, whose card says `{named}`{link}."
