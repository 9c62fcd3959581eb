"""An unrelated package of the same name is found and explained."""

import json
import warnings

import pytest

from sparsevlm import collision

OURS = "[console_scripts]\nsparsevlm = sparsevlm.cli:main\n"


def install(site, version, *, entry_points="", modules=(), recorded=None, editable=False):
    """Write what pip writes for a distribution named sparsevlm."""
    info = site / f"sparsevlm-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: sparsevlm\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)
    if editable:
        (info / "direct_url.json").write_text(json.dumps({"url": "file:///x", "dir_info": {"editable": True}}))
    package = site / "sparsevlm"
    package.mkdir(exist_ok=True)
    for module in modules:
        (package / module).write_text("")
    listed = modules if recorded is None else recorded
    (info / "RECORD").write_text("".join(f"sparsevlm/{module},,\n" for module in listed))
    return package


def find(package, *sites):
    return collision.find_collisions([str(site) for site in sites], package)


def test_this_environment_is_clean():
    assert collision.find_collisions() == []


def test_only_ours(tmp_path):
    package = install(tmp_path, "1.0.0", entry_points=OURS, modules=["__init__.py", "api.py"])
    assert find(package, tmp_path) == []


def test_no_metadata_at_all(tmp_path):
    assert find(tmp_path / "sparsevlm", tmp_path) == []


def test_other_package_in_another_site(tmp_path):
    package = install(tmp_path / "venv", "1.0.0", entry_points=OURS, modules=["__init__.py"])
    install(tmp_path / "user", "0.1.3", modules=["__init__.py", "patch.py"])
    (problem,) = find(package, tmp_path / "venv", tmp_path / "user")
    assert "version 0.1.3" in problem
    assert str(tmp_path / "user") in problem
    assert "unrelated" in problem


def test_only_the_other_one_has_metadata(tmp_path):
    install(tmp_path, "0.1.0", modules=["__init__.py"])
    (problem,) = find(tmp_path / "checkout" / "sparsevlm", tmp_path)
    assert "version 0.1.0" in problem


def test_ours_installed_twice(tmp_path):
    package = install(tmp_path / "a", "1.0.0", entry_points=OURS, modules=["__init__.py"])
    install(tmp_path / "b", "1.1.0", entry_points=OURS, modules=["__init__.py"])
    (problem,) = find(package, tmp_path / "a", tmp_path / "b")
    assert "2 times" in problem
    assert "1.1.0" in problem


def test_a_path_entry_given_twice_counts_once(tmp_path):
    package = install(tmp_path, "1.0.0", entry_points=OURS, modules=["__init__.py"])
    assert find(package, tmp_path, tmp_path) == []


def test_foreign_files_in_our_folder(tmp_path):
    package = install(
        tmp_path, "1.0.0", entry_points=OURS, modules=["__init__.py", "patch.py"], recorded=["__init__.py"]
    )
    (problem,) = find(package, tmp_path)
    assert "patch.py" in problem


def test_editable_install_lists_no_files(tmp_path):
    package = install(tmp_path, "1.0.0", entry_points=OURS, modules=["__init__.py"], recorded=[], editable=True)
    assert find(package, tmp_path) == []


def test_warning_comes_once_and_names_the_remedy(monkeypatch):
    monkeypatch.setattr(collision, "find_collisions", lambda: ["Another package is there."])
    collision.check_collision.cache_clear()
    with pytest.warns(RuntimeWarning, match="pip uninstall sparsevlm"):
        collision.check_collision()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collision.check_collision()
    collision.check_collision.cache_clear()
