"""The code in docs/ runs."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mim_jax import cli, config_files, objectives, recipe, schema
from mim_jax.plan.compiled import collectives
from mim_jax.start import Start
from mim_jax.train import train
from tests.conftest import ROOT, environment

CONFIGS = ("mae_base", "beit_base", "dvae", "mae_base_finetune", "mae_base_linear")
CONFIGS += ("ade20k_mae_base",)
KEYS = {key for name in CONFIGS for key in schema.keys_of(schema.load(f"{ROOT}/configs/{name}.py"))}


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """Writes the files of docs/add_an_objective.md -> the config's path."""
    text = (ROOT / "docs" / "add_an_objective.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        name = re.match(r"# (\w+\.py)\n", block)[1]
        (tmp_path / name).write_text(block)
    monkeypatch.setattr(objectives, "EXTERNAL", {})
    return str(tmp_path / "my_config.py")


def test_an_objective_outside_the_package(teacher, tmp_path, command):
    """It trains, its run is refused without --trust-code, and its teacher moves."""
    run = tmp_path / "run"
    trained = command("mim_jax.main", f"--config={teacher}", "--smoke", f"--workdir={run}")
    assert trained.returncode == 0, trained.stderr
    assert (run / "pictures" / "step_0000020.png").exists()
    refused = command("mim_jax.evaluate", f"--config={run}")
    assert refused.returncode == 2
    assert "which is not part of mim_jax" in refused.stderr
    assert "my_teacher.py" in refused.stderr
    evaluated = command("mim_jax.evaluate", f"--config={run}", "--trust-code")
    assert evaluated.returncode == 0, evaluated.stderr
    resumed = command("mim_jax.main", f"--config={teacher}", "--smoke", f"--workdir={run}")
    assert "is complete" in resumed.stdout


def test_a_teacher_adds_no_all_reduce(teacher):
    """With fsdp=8 its moving average is computed where its parts lie."""
    config = schema.load(teacher, ["fsdp=8", "batch_size=16"], smoke=True)
    run = recipe.build(config)
    start = Start(run, config)
    still = run.objective._replace(after=lambda params, buffers, step: buffers)
    moved = {}
    for name, objective in (("teacher", run.objective), ("still", still)):
        text = Start(run._replace(objective=objective), config).trace_step().lower().compile()
        moved[name] = {kind: size for kind, (_, size) in collectives(text.as_text()).items()}
    assert moved["teacher"] == moved["still"]
    assert moved["teacher"]["all-reduce f32"] < 0.1 * 4 * start.parameters

    state, before = start.state(), start.state().buffers["teacher"]
    steps = train(
        run.objective,
        run.optimizer,
        lambda step: run.data.training_batches(16, seed=0, start=step, stop=3),
        state=state,
        mesh=run.mesh,
        steps=3,
        seed=0,
    )
    for _, state, _ in steps:
        teacher, student = state.buffers["teacher"], state.params["encoder"]
    for kernel, old, new in zip(
        *(jax.tree.leaves(tree["block_0"]["fc1"]["kernel"]) for tree in (teacher, before, student)),
        strict=True,
    ):
        assert 0 < abs(kernel - old).max() < abs(new - old).max()


def test_the_contract_tests_take_a_config(teacher):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_contract.py", f"--config={teacher}"],
        cwd=ROOT,
        env=environment(8),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert "8 passed" in result.stdout


PAGES = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))


def anchors(path: Path) -> set[str]:
    """Returns the anchors of the headings of a page, as GitHub forms them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_exist(path):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", path.read_text()):
        page = path.parent / target if target else path
        assert page.exists(), f"{path} links to {target}"
        assert not anchor or anchor in anchors(page), f"{path} links to {target}#{anchor}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_named_configs_exist(path):
    for name in re.findall(r"configs/(\w+\.py)", path.read_text()):
        assert Path(ROOT, "configs", name).exists(), f"{path} names {name}"


def test_every_published_recipe_is_in_the_table_of_the_papers():
    """Variants that the table names by a pattern, and small examples, need no row of their own."""
    text = (ROOT / "docs" / "papers.md").read_text()
    small = ("emoji", "cifar10_", "_cifar10", "camvid")
    for path in config_files.files():
        if not any(word in path.stem for word in small):
            assert f"configs/{path.name}" in text, path


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_overrides_on_the_pages_are_keys(path):
    """`--config.KEY=VALUE` in a page names a key that some objective or optimizer has."""
    for key in re.findall(r"--config\.([a-z_0-9.]+)=", path.read_text()):
        assert key in KEYS, f"{path} names {key}"


def test_the_module_table_is_complete():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for path in (ROOT / "mim_jax").glob("[a-z]*"):
        name = path.name + "/" * path.is_dir()
        assert f"`{name}`" in text or name == "py.typed", name


def test_the_readme_names_every_command():
    named = re.findall(r"`([a-z]+)`|`mim-jax ([a-z]+)`", (ROOT / "README.md").read_text())
    assert not cli.COMMANDS.keys() - {name for pair in named for name in pair}
