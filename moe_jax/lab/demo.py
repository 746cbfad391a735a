"""The demo from start to end: train, calibrate, save, restore in a fresh process, measure, draw.

``run`` is what ``moe-jax demo`` calls. The default text is the Python standard library's own source,
so nothing is downloaded and every machine has it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import moe_jax
from moe_jax.checkpoint import CheckpointError, check_free
from moe_jax.lab import plots
from moe_jax.lab.calibration import RULES, calibration_blocks, fit_rules
from moe_jax.lab.data import Corpus, SourceFile, TextBlocks, load_corpus
from moe_jax.lab.frontier import (
    Frontier,
    held_out_blocks,
    layer_routings,
    measure,
)
from moe_jax.lab.lm_config import LMConfig
from moe_jax.lab.model_files import Model, load_model, load_variants, save_model
from moe_jax.lab.progress import progress_bar, track
from moe_jax.lab.summary import summarise
from moe_jax.lab.training import train
from moe_jax.models.confidence import EQUAL_QUALITY
from moe_jax.models.experts_page import experts_page
from moe_jax.models.experts_report import report_of_choices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of a run."""

    model: LMConfig
    steps: int
    rules: tuple[str, ...] = tuple(RULES)
    savings: tuple[float, ...] = (0.10, 0.20, 0.35)
    calibration_tokens: int = 16_384
    held_out_tokens: int = 32_768


FULL_STEPS = 350
FULL = Settings(model=LMConfig(), steps=FULL_STEPS)
QUICK = Settings(
    model=LMConfig(num_layers=2, d_model=64, num_heads=2, num_experts=8, d_ff=64),
    steps=120,
    # Every rule compiles for itself, which is most of what a short run does.
    rules=("top_p", "min_p", "dynamic_k_entropy", "drop_lowest", "drop_random"),
    calibration_tokens=8_192,
    held_out_tokens=16_384,
)


def run(
    out: Path,
    quick: bool = False,
    seed: int = 0,
    console: Console | None = None,
    *,
    settings: Settings | None = None,
    corpus: Corpus | None = None,
) -> dict[str, Any]:
    """Runs the demo and leaves in ``out``: ``model/`` and ``calibrated/`` (checkpoints), pictures,
    ``source.html``, ``results.json`` and ``measurements.npz`` (nats of each file under each rule).

    Args:
        out: the folder; results of an earlier run are replaced, but a quick run never replaces a
            full one.
        quick: a smaller model and less of it, in under a minute.
        seed: of the model, the batches and the blocks measured on.
        console: where the bar and the summary go; None is standard output.
        settings: sizes of your own, instead of ``FULL`` or ``QUICK``.
        corpus: the text; None is ``load_corpus()``.

    Returns:
        What ``results.json`` holds.

    Raises:
        RuntimeError: a fresh process restored the checkpoint and routed differently.
        DataError: there is no text.
        CheckpointError: ``out`` is a checkpoint, has a full demo and this one is quick, or cannot be
            written.
    """
    started = time.perf_counter()
    console = Console() if console is None else console
    settings = settings or (QUICK if quick else FULL)
    out = Path(out).resolve()
    check_place(out, quick)
    for name in ("model", "calibrated"):
        check_free(out / name, overwrite=True)
    out.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus() if corpus is None else corpus
    config, seconds = settings.model, {}
    calibration = calibration_blocks(config, corpus, tokens=settings.calibration_tokens, seed=seed)
    held_out = held_out_blocks(config, corpus, tokens=settings.held_out_tokens, seed=seed)

    with progress_bar(console) as bar:
        with _timed(seconds, "train"):
            path, training = train(
                config, out / "model", settings.steps, seed, bar, overwrite=True, corpus=corpus
            )
            model = load_model(path)
        with _timed(seconds, "calibrate"):
            variants = fit_rules(
                model, calibration, rules=settings.rules, savings=settings.savings, progress=bar
            )
        with _timed(seconds, "save and check"), track(bar, "save", 2) as advance:
            saved = save_model(out / "calibrated", model, variants=variants, overwrite=True)
            advance("restoring in a fresh process")
            fresh = _check_in_fresh_process(saved, out, calibration)
            advance(f"{fresh['compared']} routings equal bit for bit")
        with _timed(seconds, "evaluate"):
            measured = measure(
                model,
                variants,
                held_out,
                savings=settings.savings,
                rules=settings.rules,
                progress=bar,
            )
        with _timed(seconds, "draw"), track(bar, "draw", 4) as advance:
            shown = _showcase(measured)
            pictures = _draw(out, model, measured, shown, corpus.held_out, advance)
    seconds["total"] = time.perf_counter() - started

    results: dict[str, Any] = {
        "library_version": moe_jax.__version__,
        "quick": quick,
        "seed": seed,
        "model": config.to_json(),
        "training": training,
        "data": corpus.describe(),
        "calibration_tokens": calibration.num_tokens,
        "held_out_tokens": held_out.num_tokens,
        "held_out_files": len(held_out.paths),
        "intervals": "95 %, paired bootstrap over held-out files",
        "weights": "renormalised" if config.renormalize else "raw probabilities, as trained",
        "equal_quality": EQUAL_QUALITY,
        "trained": {
            "k": config.k,
            "bits_per_byte": measured.baseline.bits_per_byte,
            "mean_k": measured.baseline.mean_k,
            "max_over_mean_load": _imbalance(measured.baseline.tokens_per_expert),
        },
        "rows": list(measured.rows),
        "fresh_process": fresh,
        "showcase": shown,
        "histogram": measured.evaluations[shown].histogram.tolist(),
        "pictures": [str(p.relative_to(out)) for p in pictures],
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    write_results(out, results)
    arrays = {name: one.nats_per_file for name, one in measured.evaluations.items()}
    arrays |= {
        "trained": measured.baseline.nats_per_file,
        "bytes": measured.baseline.bytes_per_file,
    }
    np.savez(out / "measurements.npz", allow_pickle=False, **arrays)
    summarise(results, out, console)
    return results


def check_place(out: Path, quick: bool) -> None:
    """Raises CheckpointError for a checkpoint, or if a quick run would replace a full one."""
    if (out / "manifest.json").exists():
        raise CheckpointError(
            f"{out}: expected a folder for the demo's results, got a checkpoint. Choose another: "
            "the demo puts its own checkpoints and pictures inside."
        )
    if not quick:
        return
    try:
        before = json.loads((out / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(before, dict) and not before.get("quick", True):
        raise CheckpointError(
            f"{out}: expected a folder without the results of a full demo, got one with them. A quick "
            "demo does not replace them: choose another folder with --out."
        )


def write_results(out: Path, results: Mapping[str, Any]) -> None:
    """Writes ``results.json``."""
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    (out / "results.json").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


# --- the same in a fresh process ------------------------------------------------------------


def routing_digests(variants: Mapping[str, Model], blocks: TextBlocks) -> dict[str, str]:
    """For every variant and layer, a SHA-256 over all bits of what it decides for these blocks."""
    digests = {}
    for name, model in variants.items():
        for layer, routing in enumerate(layer_routings(model, blocks)):
            digest = hashlib.sha256()
            for part in (routing.expert_indices, routing.combine_weights, routing.router_logits):
                digest.update(np.ascontiguousarray(part).tobytes())
            digests[f"{name or 'trained'}/layer_{layer}"] = digest.hexdigest()
    return digests


def _check_in_fresh_process(checkpoint: Path, out: Path, blocks: TextBlocks) -> dict[str, Any]:
    """Restores the checkpoint here and in a new interpreter and compares every routing."""
    sample = blocks.take(8)
    file, answer = out / ".check.npz", out / ".check.json"
    np.savez(
        file,
        inputs=sample.inputs,
        targets=sample.targets,
        mask=sample.mask,
        file_index=sample.file_index,
    )
    command = [sys.executable, "-m", "moe_jax.lab.demo", str(checkpoint), str(file), str(answer)]
    root = Path(moe_jax.__file__).resolve().parents[1]  # importable without being installed, too
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"demo: expected a fresh process to restore {checkpoint}, got exit status "
            f"{done.returncode}. It said: {done.stderr.strip()[-2000:]}"
        )
    theirs = json.loads(answer.read_text(encoding="utf-8"))
    ours = routing_digests(load_variants(checkpoint), sample)
    file.unlink()
    answer.unlink()
    differ = sorted(name for name in ours if ours[name] != theirs.get(name))
    if differ or ours.keys() != theirs.keys():
        raise RuntimeError(
            f"demo: expected the restored rules to route bit for bit the same in a fresh process, "
            f"got {len(differ)} of {len(ours)} that differ ({', '.join(differ[:3])}). Please "
            "report this with the versions in the checkpoint's manifest."
        )
    return {"compared": len(ours), "tokens": sample.num_tokens, "equal": True}


def _answer_check(arguments: Sequence[str]) -> None:
    checkpoint, file, answer = arguments
    with np.load(file) as arrays:
        blocks = TextBlocks(**{name: arrays[name] for name in arrays.files}, paths=())
    digests = routing_digests(load_variants(checkpoint), blocks)
    Path(answer).write_text(json.dumps(digests), encoding="utf-8")


# --- pictures -------------------------------------------------------------------------------


def _showcase(measured: Frontier) -> str:
    """The dynamic rule to draw: the cheapest in quality at the middle budget."""
    savings = sorted({row["saving"] for row in measured.rows})
    middle = savings[len(savings) // 2]
    dynamic = [r for r in measured.rows if r["saving"] == middle and not r["control"]]
    return min(dynamic or measured.rows, key=lambda row: row["delta"])["variant"]


def _draw(
    out: Path, model: Model, measured: Frontier, shown: str, files: Sequence[SourceFile], advance
) -> list[Path]:
    row = next(r for r in measured.rows if r["variant"] == shown)
    label = f"{row['label']} at -{row['saving']:.0%}"
    one, config = measured.evaluations[shown], model.config
    paths = [plots.frontier(measured.rows, out / "frontier.png", equal_quality=EQUAL_QUALITY)]
    advance("frontier")
    paths.append(
        plots.experts_per_token(
            one.histogram,
            out / "experts_per_token.png",
            title=f"Experts per token: {label}",
        )
    )
    advance("experts per token")
    loads = {
        f"trained, k={config.k}": measured.baseline.tokens_per_expert,
        label: one.tokens_per_expert,
    }
    paths.append(plots.utilisation(loads, out / "utilisation.png"))
    advance("utilisation")
    file = min(files, key=lambda f: abs(f.data.size - 6_000))
    routers, states = measured.variants[shown]
    ruled = dataclasses.replace(model, routers=routers, states=states)
    choices = choose_experts(ruled, file.data)
    report = report_of_choices(
        choices,
        byte_characters(file.data.tobytes()),
        config.num_experts,
        title=f"{file.path}: experts per byte",
    )
    paths.append(
        experts_page(
            report,
            out / "source.html",
            note=f"{label}; a file that the model was neither trained nor calibrated on. "
            f"Mean {report.mean_k.mean():.2f} of at most {config.k}.",
        )
    )
    advance("source page")
    return paths


def byte_characters(data: bytes) -> list[str]:
    """The character of each byte: the first byte of a character has it, the others have nothing."""
    out = []
    for character in data.decode("utf-8", errors="surrogateescape"):
        shown = "\ufffd" if "\udc80" <= character <= "\udcff" else character
        out += [shown, *[""] * (len(character.encode("utf-8", errors="surrogateescape")) - 1)]
    return out


def choose_experts(model: Model, data: np.ndarray) -> np.ndarray:
    """i16[layers, size, K]: the experts of each byte of u8[size], with its context before it.

    Best first, -1 where a slot is unused. Windows overlap by half, and a byte is taken from the
    window where it has more context.
    """
    length = model.config.length
    half = length // 2
    starts = range(0, max(1, data.size - half), half)
    inputs = np.zeros((len(starts), length), np.int32)
    mask = np.zeros((len(starts), length), bool)
    for i, start in enumerate(starts):
        piece = data[start : start + length]
        inputs[i, : piece.size] = piece
        mask[i, : piece.size] = True
    blocks = TextBlocks(
        inputs=inputs,
        targets=inputs,
        mask=mask,
        file_index=np.zeros(len(starts), np.int32),
        paths=("",),
    )
    layers = []
    for routing in layer_routings(model, blocks):
        indices = routing.expert_indices.reshape(len(starts), length, -1)
        windows = np.where(indices < routing.num_experts, indices, -1).astype(np.int16)
        chosen = np.full((data.size, windows.shape[-1]), -1, np.int16)
        for i, start in enumerate(starts):
            skip = half if start else 0
            size = min(length, data.size - start)
            chosen[start + skip : start + size] = windows[i, skip:size]
        layers.append(chosen)
    return np.stack(layers)


def _imbalance(tokens_per_expert: np.ndarray) -> float:
    return float((tokens_per_expert.max(axis=1) / tokens_per_expert.mean(axis=1)).max())


if __name__ == "__main__":
    _answer_check(sys.argv[1:])
