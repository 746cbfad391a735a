"""The documents are true: their Python runs, their commands, paths, links and modules exist."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import typer.main

from moe_jax.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "notebooks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Pages of the site that website/pages.py generates.
GENERATED = {ROOT / "docs" / "rules.md"}
# Folders that a document tells the reader to make.
MADE_BY_READERS = {"deploy/docker/wheels/"}
HUB = ROOT / "tests" / "goldens" / "hub" / "mixtral_fused"


def blocks(path: Path, language: str) -> list[str]:
    """Code blocks of a document, without the indentation of a list."""
    pattern = rf"^( *)```{language}\n(.*?)^\1```$"
    return [
        re.sub(rf"^{indent}", "", code, flags=re.M)
        for indent, code in re.findall(pattern, path.read_text(), re.M | re.S)
    ]


def run(code: str, *, devices: int = 1) -> str:
    """Runs Python as a reader would, in a process of its own, and returns what it printed."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "XLA_FLAGS": flags,
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def readme() -> str:
    """The README's Python from top to bottom, with a small checkpoint in the place of the reader's."""
    code = "\n".join(blocks(ROOT / "README.md", "python"))
    model = str(ROOT / "tests" / "goldens" / "models" / "olmoe")
    for placeholder, value in (
        ('"path/to/checkpoint", layer=3', f"{str(HUB)!r}, layer=1"),
        ('"path/to/model"', repr(model)),
        ('"runs/model-20"', repr(f"{tempfile.mkdtemp()}/model-20")),
    ):
        assert placeholder in code
        code = code.replace(placeholder, value)
    assert "(512, 4096)" in code
    return code.replace("(512, 4096)", "(512, 16)")


def test_the_readme_runs_from_top_to_bottom():
    """The pages that go on with its names run after it, in the same process."""
    training = blocks(ROOT / "docs" / "concepts.md", "python")
    [_, whole] = blocks(ROOT / "docs" / "how-to" / "published-model.md", "python")
    model = str(ROOT / "tests" / "goldens" / "models" / "olmoe")
    printed = run("\n".join([readme(), *training, whole.replace("path/to/model", model)]))
    assert printed.startswith("(4, 128, 64) 1.7")
    assert "MinP" in printed


SERVED = """
from moe_jax import RouterFactory
quiet = {"buckets": "512", "log_level": "ERROR"}
with RouterFactory.create_from_environment(checkpoint="runs/linen", **quiet) as engine:
    output = engine.infer("moe", np.asarray(batch)).arrays["output"]
    np.testing.assert_allclose(output, y, rtol=2e-4, atol=2e-5)
    counts = engine.route(np.asarray(batch))["num_experts_per_token"]
    assert counts.mean() == aux.stats.mean_experts_per_token
"""


NESTED = """
from moe_jax.checkpoint import open_checkpoint
np.testing.assert_array_equal(y, net.apply(variables, batch))
stored = open_checkpoint("runs/linen-net").layer("layer_1")
np.testing.assert_array_equal(
    stored.layer["experts"]["up"], variables["params"]["moe_1"]["experts"]["up"]
)
"""
AFTER = {'save("runs/linen", ': SERVED, 'save("runs/linen-net", ': NESTED}


def test_the_how_to_pages_run(tmp_path):
    """One process for all, as each page stands alone but imports the same library."""
    pages = ROOT / "docs" / "how-to"
    code = "\n".join(
        block + "".join(more for line, more in AFTER.items() if line in block)
        for name in ("own-text", "own-model", "budget")
        for block in blocks(pages / f"{name}.md", "python")
    ).replace("runs/linen", str(tmp_path / "linen"))
    code = f"import numpy as np\n{code}"
    [retrofit, _] = blocks(pages / "published-model.md", "python")
    shown = "\n".join(blocks(ROOT / "README.md", "python")).splitlines()
    for line in retrofit.splitlines()[1:]:
        assert line in shown, "the page shows lines of the README, which run there"
    printed = run(code).splitlines()
    assert printed[0].startswith(("file", "section"))
    assert printed[1] == "(4, 128, 64) 1.7"
    assert float(printed[2]) == pytest.approx(2.5, rel=0.01)


def test_the_table_of_the_readme_is_the_stored_result():
    from moe_jax.lab.seeds import markdown_table

    results = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text("utf-8"))
    readme = (ROOT / "README.md").read_text("utf-8")
    assert markdown_table(results) in readme
    assert len(results["seeds"]) >= 3
    assert f"`{results['command']}`" in readme


def test_the_scaling_example_runs_on_eight_devices():
    [code] = [c for c in blocks(ROOT / "docs" / "scaling.md", "python") if "pad_experts(" in c]
    start = blocks(ROOT / "README.md", "python")[0]
    assert run(f"{start}\n{code}\nprint(y.shape, len(jax.devices()))", devices=8).endswith(
        "(4, 128, 64) 8\n"
    )


def test_the_page_about_elastic_budgets_runs():
    code = "\n".join(blocks(ROOT / "docs" / "how-to" / "elastic.md", "python"))
    assert run(code) == "2.5\n"


def test_the_page_about_rules_runs_and_its_rule_keeps_the_contract():
    code = "\n".join(blocks(ROOT / "docs" / "write_a_rule.md", "python"))
    assert run(code) == "29 promises kept\n2.0 experts a token\n"


def test_the_service_in_a_program_runs():
    [code] = blocks(ROOT / "docs" / "operations.md", "python")
    narrow = {"MOE_INPUT_DIM": "768", "MOE_BUCKETS": "1024"}
    printed = run(f"import os\nos.environ.update({narrow})\n{code}\nprint(result.keys())")
    assert "healthy" in printed
    assert "expert_indices" in printed


def test_the_client_of_the_service_runs():
    pytest.importorskip("tritonclient.http")
    from tests.serving.served import served, small_engine

    [code] = blocks(ROOT / "docs" / "http.md", "python")
    assert "127.0.0.1:8000" in code
    with served(small_engine()) as service:
        assert "(4, 128, 4)" in run(code.replace("127.0.0.1:8000", service.address))
        gateway = (ROOT / "examples" / "routing_gateway.py").read_text(encoding="utf-8")
        head, _, _ = gateway.partition('if __name__ == "__main__":')
        printed = run(f"{head}\nmain({service.address!r})")
    assert "batch 3: requests [" in printed
    [*_, one, two] = printed.splitlines()
    assert (one.split(":")[0], two.split(":")[0]) == ("server 0", "server 1")
    means = [float(mean) for mean in re.findall(r"mean k (\d\.\d+)", printed)]
    assert means == sorted(means)
    assert means[0] < means[-1]


def test_the_client_of_all_layers_runs(tmp_path):
    import jax

    from moe_jax import TopK
    from moe_jax.checkpoint import Checkpoint, save
    from tests.serving.served import served, small_engine

    names = ["layer_3", "layer_10"]
    router = TopK(num_experts=4, k=2)
    content = Checkpoint(
        params={n: router.init(jax.random.key(i), 16) for i, n in enumerate(names)},
        routers=dict.fromkeys(names, router),
        states=dict.fromkeys(names, router.init_state()),
    )
    folder = save(tmp_path / "model", content)
    [code] = blocks(ROOT / "docs" / "how-to" / "service.md", "python")
    assert "127.0.0.1:8000" in code
    # What the page says of x and states.
    inputs = "x = np.ones((2, 4, 16), np.float32)\nstates = [x, 2 * x]\n"
    head, _, rest = code.partition("service = ")
    engine = small_engine(checkpoint=str(folder), serve_moe="off", buckets="8")
    with served(engine) as service:
        program = f"{head}{inputs}service = {rest}".replace("127.0.0.1:8000", service.address)
        same = "assert (every['expert_indices'][0] == one['expert_indices']).all()"
        assert run(f"{program}\n{same}") == "(2, 2, 4, 2)\n"


def commands(path: Path) -> list[list[str]]:
    """Words of each ``moe-jax`` command in a document's shell blocks and in its text."""
    shell = "\n".join(blocks(path, "bash")).replace("\\\n", " ")
    lines = [line for line in shell.splitlines() if "moe-jax" in line]
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    lines += re.findall(r"`([^`]*moe-jax [^`]*)`", text)
    lines = [part for line in lines for part in re.split(r"&&|;|\||>", line)]
    results = []
    for line in lines:
        words = shlex.split(line.replace("…", ""), comments=True)
        if "moe-jax" in words:
            results.append(words[words.index("moe-jax") + 1 :])
    return [words for words in results if words]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_and_their_options_exist(path):
    for words in commands(path):
        command, left = typer.main.get_command(app), list(words)
        if left[0] == "--import":  # an option of moe-jax itself, with its value
            left = left[2:]
        while left and left[0] in getattr(command, "commands", {}):
            command = command.commands[left.pop(0)]  # pyright: ignore
        assert command.name != "moe-jax" or left[0].startswith("-"), f"unknown command: {words}"
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        unknown = [word for word in left if word.startswith("--") and word not in options]
        assert not unknown, (words, unknown)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_paths_and_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    named = re.findall(
        r"`((?:moe_jax|tests|docs|benchmarks|deploy|monitoring|configs|examples)/[\w./-]*)`", text
    )
    missing = [name for name in named if not (ROOT / name).exists() and name not in MADE_BY_READERS]
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        if file.startswith("http"):
            continue
        linked = path if not file else path.parent / file
        if linked.resolve() in GENERATED:
            continue
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            missing.append(target)
    assert missing == []


def anchors(path: Path) -> set[str]:
    """Anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_modules_that_a_document_names_can_be_imported(path):
    for dotted in sorted(set(re.findall(r"`(moe_jax(?:\.\w+)+)[`(]", path.read_text()))):
        assert pkgutil.resolve_name(dotted) is not None
