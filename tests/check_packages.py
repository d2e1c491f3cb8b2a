"""Check the packages as others get them: ``python tests/check_packages.py FOLDER``, with a scratch folder.

The source distribution is unpacked and tested by its own tests: all are collected, a few run. The wheel, which is built
from it, goes into a new environment with what it requires and no extra. There ``timm.create_model`` works, and
``supervit`` names the extra that it lacks. That environment links to the packages of this one instead of downloading
them; the packages that build ours are downloaded.
"""
import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
QUICK_TESTS = 'test_sharing or (test_golden and deit)'
USE = '''
from importlib.resources import files
import timm, timm_supervit
folder = files('timm_supervit')
assert str(folder).startswith({site!r}), folder
assert (folder / 'py.typed').is_file() and (folder / 'recipes' / 'digits.yaml').is_file()
print(timm_supervit.__version__, len(timm.create_model('supervit_small').subnets))
'''


def link_requirements(site: Path) -> None:
    """Link what the distributions in a folder of packages require, and what those require, from this environment."""
    pending, seen = [(found, '') for found in distributions(path=[str(site)])], set()
    while pending:
        found, extra = pending.pop()
        for requirement in map(Requirement, found.requires or []):
            if requirement.marker and not requirement.marker.evaluate({'extra': extra}):
                continue
            required = {(requirement.name, extra) for extra in ('', *requirement.extras)} - seen
            seen |= required
            pending += [(distribution(name), extra) for name, extra in required]
    for name in {name for name, _ in seen}:
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or []} - {'..', '__pycache__'}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))


def check_source(archive: Path, folder: Path) -> None:
    """Run tests of a source distribution, on its own code."""
    shutil.unpack_archive(archive, folder)
    source, = folder.iterdir()
    subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-n', '0', '-p', 'no:cacheprovider', '-k', QUICK_TESTS],
        check=True, cwd=source, env={**os.environ, 'PYTHONPATH': str(source)})


def check_wheel(wheel: Path, folder: Path) -> None:
    """Use a wheel in an environment without extras."""
    venv.create(folder, symlinks=True)
    python = folder / 'bin' / 'python'
    subprocess.run(
        [sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', '--no-deps', '--no-index', wheel],
        check=True)
    site, = folder.glob('lib/python*/site-packages')
    link_requirements(site)
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    subprocess.run([python, '-W', 'error', '-c', USE.format(site=str(site))], check=True, cwd=folder, env=env)
    command = subprocess.run(
        [folder / 'bin' / 'supervit', 'quickstart'],
        check=False, stderr=subprocess.PIPE, text=True, cwd=folder, env=env)
    print(command.stderr, end='')
    if command.returncode != 1 or 'pip install "timm-supervit[tools]"' not in command.stderr:
        sys.exit(f'supervit without extras ended with {command.returncode} and did not name the extra')


def main(folder: Path) -> None:
    """Build both packages into the folder, and check them there."""
    subprocess.run(
        [sys.executable, '-m', 'build', '--outdir', folder / 'dist', ROOT], check=True, stdout=subprocess.DEVNULL)
    archive, = folder.glob('dist/*.tar.gz')
    wheel, = folder.glob('dist/*.whl')
    check_source(archive, folder / 'source')
    check_wheel(wheel, folder / 'wheel')


if __name__ == '__main__':
    main(Path(sys.argv[1]).resolve())
