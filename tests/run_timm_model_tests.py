"""Run timm's own model tests on every model that this package registers: ``python tests/run_timm_model_tests.py``.

They come from the source distribution of the installed timm, which pip downloads, and run as they are but for two
lists: our modules and names are added to those of timm's vision transformers. Only the TorchScript tests are left out.
``timm_variants.py`` adds networks on other backbones.
Arguments are handed on to pytest.
"""
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import distribution
from pathlib import Path

import timm
import torch
from hub_server import hub_environment, serve
from timm.models import save_for_hf

VARIANTS = Path(__file__).with_name('timm_variants.py')


def download_tests(folder: Path) -> Path:
    """Unpack the tests of the installed timm, and nothing else that could be imported in its place."""
    requirement = f'timm=={timm.__version__}'
    subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--no-deps',
         '--no-binary', 'timm', '--dest', folder, requirement],
        check=True)
    with tarfile.open(folder / f'timm-{timm.__version__}.tar.gz') as archive:
        for member in archive.getmembers():
            name = member.name.partition('/')[2]
            if member.isfile() and (name == 'pyproject.toml' or name.startswith('tests/')):
                path = folder / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
    return folder / 'tests' / 'test_models.py'


def add_to_list(source: str, name: str, items: list[str]) -> str:
    """Add items to a list that is written out in a test file.

    Raises:
        SystemExit: If the file has no such list, or a list of that name without vision transformers.
    """
    match = re.search(rf'^{name} = \[\n((?:    .*\n)+?)\]\n', source, re.MULTILINE)
    if match is None or not re.search(r"'(vision_transformer|vit_\*)'", match[1]):
        sys.exit(f'timm {timm.__version__} has no list {name} of models like vision transformers in its tests')
    lines = ''.join(f'    {item!r},\n' for item in items)
    return source[:match.end(1)] + lines + source[match.end(1):]


def provide_weights(hub: Path, torch_home: Path, names: list[str]) -> None:
    """Put random weights where the models look for pretrained ones: on the Hub and in torch's download cache."""
    for name in names:
        for tagged in timm.list_pretrained(f'{name}.*'):
            cfg = timm.models.get_pretrained_cfg(tagged)
            if cfg.url:
                cached = torch_home / 'hub' / 'checkpoints' / cfg.url.rpartition('/')[2]
                cached.parent.mkdir(parents=True, exist_ok=True)
                torch.save(timm.create_model(name).state_dict(), cached)
                continue
            repository = cfg.hf_hub_id
            plain = repository.partition('/')[2].partition('.')[0]
            model = timm.create_model(plain if timm.is_model(plain) else name)
            save_for_hf(model, str(hub / repository), safe_serialization=True)


def main() -> int:
    """Run the tests; return pytest's exit status."""
    entry_points = distribution('timm-supervit').entry_points.select(group='timm.models')
    names = sorted(entry_point.name for entry_point in entry_points)
    if unknown := set(names) - set(timm.list_models()):
        sys.exit(f'timm does not know {", ".join(sorted(unknown))}')
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tests = download_tests(folder)
        source = tests.read_text()
        shutil.copy(VARIANTS, tests.with_name('conftest.py'))
        modules = {entry_point.module.rpartition('.')[2] for entry_point in entry_points} | {'conftest'}
        source = add_to_list(source, 'FEAT_INTER_FILTERS', sorted(modules))
        source = add_to_list(source, 'NON_STD_FILTERS', ['supervit', 'supervit_*'])
        tests.write_text(source)
        provide_weights(folder / 'hub', folder / 'torch', names)
        with serve(folder / 'hub') as url:
            command = [
                sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '-q', '-ra', '-n', 'auto', '--maxprocesses=4',
                '-k', f'({" or ".join(names)}) and not torchscript', str(tests), *sys.argv[1:]]
            return subprocess.run(
                command, check=False, cwd=folder,
                env={**hub_environment(url, folder / 'cache'), 'TORCH_HOME': str(folder / 'torch'),
                     'OMP_NUM_THREADS': '1'}).returncode  # a process for each core


if __name__ == '__main__':
    sys.exit(main())
