"""timm knows the models after installation, whatever is imported first, and nothing here can break torch or timm.

Each test runs code in a fresh process, since what a process has imported can't be taken back.
"""
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import pytest
import timm

import timm_supervit
from timm_supervit.timm_patches import PATCHES

MODELS = ['supervit_base', 'supervit_digits', 'supervit_small', 'supervit_tiny']
# Tools and commands import these others, and never are what timm meets first: one of each kind is enough.
SUBMODULES = [
    module.name for module in pkgutil.walk_packages(timm_supervit.__path__, 'timm_supervit.')
    if not module.name.startswith(('timm_supervit.tools.', 'timm_supervit.cli.', 'timm_supervit.__main__'))
    and module.name != 'timm_supervit.serving']  # Ray warns when it is imported
SUBMODULES += ['timm_supervit.tools.evaluate', 'timm_supervit.cli.options']
# Those of which each imports many others.
ENTRANCES = {f'timm_supervit.{name}' for name in (
    'cascade', 'loading.load', 'models.lvvit', 'models.supervit', 'tools.evaluate', 'training.task')}

# Runs each code that it reads, as JSON in a line, in a fork of a process that has torch loaded but neither timm nor
# this package, and answers with its variable "answer": as good as a fresh process for what is tested here, and faster.
SERVE_FORKS = '''
import json, os, sys, traceback
import torch, torchvision.models.feature_extraction, huggingface_hub, safetensors.torch, yaml  # timm's, to save time
assert not any(name.startswith(('timm', 'wrapt')) for name in sys.modules)
for line in sys.stdin:
    read, write = os.pipe()
    if not os.fork():
        try:
            scope = {}
            exec(json.loads(line), scope)
            answer = scope['answer']
        except BaseException:
            answer = traceback.format_exc()
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        print(pipe.read(), flush=True)
'''
# What torch does at the end of its import, which those forks have gone without.
AUTOLOAD = 'import torch; torch._import_device_backends()'


def run_python(code: str, *args: str, flags: tuple[str, ...] = (), **environment: str) -> Any:
    """Run code in a fresh process outside the checkout; return the JSON that it prints and what stands on stderr."""
    result = subprocess.run(
        [sys.executable, *flags, '-c', code, *args],
        capture_output=True, text=True, check=False, cwd='/', env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


@pytest.fixture(scope='module')
def run_in_fork() -> Iterator[Callable[[str], Any]]:
    """Run code with torch loaded, by a process in which autoload is off; return its answer."""
    with subprocess.Popen(
            [sys.executable, '-c', SERVE_FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd='/',
            env={**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'}) as process:

        def run(code: str) -> Any:
            print(json.dumps(code), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


def test_timm_knows_the_models_without_an_import_of_this_package() -> None:
    (listed, pretrained, created), errors = run_python(
        'import json, timm\n'
        'm = timm.create_model("supervit_tiny", depth=4, drop_layers=(1, 2))\n'
        'print(json.dumps([timm.list_models("supervit*"), timm.list_pretrained("supervit*"), type(m).__name__]))',
        flags=('-W', 'error'))
    assert set(MODELS) <= set(listed)
    assert len(listed) == len(set(listed))
    assert {'supervit_tiny.deit_in1k', 'supervit_small.deit_in1k', 'supervit_base.deit_in1k'} <= set(pretrained)
    assert created == 'SuperVisionTransformer'
    assert errors == ''


def test_every_factory_is_an_entry_point() -> None:
    entry_points = distribution('timm-supervit').entry_points
    assert {e.name for e in entry_points.select(group='timm.models')} == set(timm.list_models('supervit*'))
    for entry_point in entry_points.select(group='timm.models'):
        assert entry_point.load() is timm.models.model_entrypoint(entry_point.name)
    assert [e.value for e in entry_points.select(group='torch.backends')] == [
        'timm_supervit.registration:install_hooks']


def test_importing_torch_alone_imports_no_timm_and_says_nothing() -> None:
    loaded, errors = run_python(
        'import torch, json, sys\n'
        'print(json.dumps([n for n in sys.modules if n.split(".")[0] in ("timm", "torchvision")]))',
        flags=('-W', 'error'))
    assert loaded == []
    assert errors == ''


def test_importing_the_package_imports_neither_torch_nor_timm_nor_torchvision() -> None:
    loaded, _ = run_python(
        'import timm_supervit, json, sys\n'
        'names = dir(timm_supervit)\n'
        'print(json.dumps([n for n in sys.modules if n.split(".")[0] in ("torch", "timm", "torchvision")]))')
    assert loaded == []


def test_public_names_are_resolved_on_first_use() -> None:
    from timm_supervit import Subnet, SuperVisionTransformer, SuperViTTask

    assert {'Subnet', 'SuperViTTask', 'SuperVisionTransformer'} <= set(timm_supervit.__all__)
    assert set(timm_supervit.__all__) <= set(dir(timm_supervit))
    assert [o.__name__ for o in (Subnet, SuperVisionTransformer, SuperViTTask)] == [
        'Subnet', 'SuperVisionTransformer', 'SuperViTTask']
    with pytest.raises(AttributeError, match='Subnets'):
        _ = timm_supervit.Subnets


def test_the_package_states_its_version_and_that_it_is_typed() -> None:
    assert timm_supervit.__version__ == version('timm-supervit')
    assert (Path(timm_supervit.__file__).parent / 'py.typed').is_file()


ORDERS = {
    **{f'{name} first': f'import {name}' for name in SUBMODULES},
    'the package before timm': 'import timm_supervit',
    'the package after timm': 'import timm, timm_supervit',
    'the package after timm.models': 'import timm.models; import timm_supervit',
    'the package after timm.task': 'import timm.task, timm_supervit',
    'a public name before timm': 'from timm_supervit import SuperVisionTransformer',
    'the task before timm': 'from timm_supervit import SuperViTTask',
    'the package twice': 'import timm_supervit, importlib; importlib.reload(timm_supervit)',
    'the package twice, timm between':
        'import timm_supervit, importlib, timm, timm_supervit.registration as r; importlib.reload(timm_supervit); '
        'r.install_hooks(); import warnings; warnings.simplefilter("error"); importlib.reload(timm_supervit)',
    'the hooks installed by torch and then the package': f'{AUTOLOAD}; import timm_supervit',
    'a submodule of timm first': 'import timm.models.vision_transformer, timm_supervit',
}


LIST_MODELS = '''
import timm
model = timm.create_model('supervit_digits')
listed = timm.list_models('supervit*')
answer = [type(model).__name__, len(listed), len(set(listed))]
'''
IMPORT_LATE = '''
import timm
before = timm.list_models('supervit*')
import timm_supervit
answer = [before, timm.list_models('supervit*')]
'''


def rarely(names: Any, common: set[str]) -> list[Any]:
    """Return parameters of which only some common ones run each time."""
    return [name if name in common else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize('order', rarely(ORDERS, {*ORDERS} - {f'{name} first' for name in {*SUBMODULES} - ENTRANCES}))
def test_any_order_of_imports_registers_each_model_once(order: str, run_in_fork: Any) -> None:
    result = run_in_fork(f'import warnings; warnings.simplefilter("error"); {ORDERS[order]}{LIST_MODELS}')
    assert isinstance(result, list), result
    name, listed, distinct = result
    assert name == 'SuperVisionTransformer'
    assert listed == distinct >= len(MODELS)


def test_autoload_is_the_only_thing_switched_off_by_its_variable(run_in_fork: Any) -> None:
    before, after = run_in_fork(IMPORT_LATE)
    assert before == []
    assert set(MODELS) <= set(after)


WORKER = '''
import json, sys
import torch
import torch.multiprocessing as mp


def run(creates, inbox, outbox):
    """Create a network, and then run one that is sent."""
    images, shape = torch.zeros(1, 3, 24, 24), None
    if creates:
        import timm
        shape = list(timm.create_model('supervit_digits', num_classes=7)(images).shape)
    outbox.put([shape, inbox.get()(images, img_size=12, keep_rate=0.5).tolist()])


if __name__ == '__main__':
    import timm_supervit, timm
    model = timm.create_model('supervit_digits').eval()
    context = mp.get_context('spawn')
    inbox, outbox = context.Queue(), context.Queue()
    process = context.Process(target=run, args=(len(sys.argv) == 1, inbox, outbox))
    process.start()
    inbox.put(model)
    shape, there = outbox.get(timeout=120)
    process.join()
    here = model(torch.zeros(1, 3, 24, 24), img_size=12, keep_rate=0.5).tolist()
    print(json.dumps([shape, torch.allclose(torch.tensor(there), torch.tensor(here))]))
'''


@pytest.mark.parametrize('autoload', rarely(['1', '0'], {'1'}))
def test_spawned_workers_create_models_and_receive_pickled_ones(tmp_path: Path, autoload: str) -> None:
    script = tmp_path / 'script.py'
    script.write_text(WORKER)
    # Without autoload a worker knows the models once something of this package arrives in it, as the pickled one does.
    arguments = [] if autoload == '1' else ['pickled model only']
    result = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': autoload})
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [[1, 7] if autoload == '1' else None, True]


# What else of timm must go on working while this package is broken, or does not fit it.
USE_TIMM = '''
import json, sys, warnings
{breakage}
with warnings.catch_warnings(record=True) as at_torch:
    warnings.simplefilter('always')
    {autoload}
with warnings.catch_warnings(record=True) as at_timm:
    warnings.simplefilter('always')
    import timm, timm.task, timm.data, torch
    from timm.task.classification import ClassificationTask
    model = timm.create_model('test_vit')
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    loss = task(torch.zeros(2, 3, 160, 160), torch.tensor([0, 1]))['loss']
ours = [str(w.message) for w in at_timm if 'timm-supervit' in str(w.message)]
answer = [[str(w.message) for w in at_torch], ours, bool(loss.isfinite()), timm.list_models('supervit*')]
'''

BREAK_MODULE = '''
class Break:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise {error}
sys.meta_path.insert(0, Break())
'''

BREAKAGES = {
    'wrapt is missing': (
        BREAK_MODULE.format(name='wrapt', error='ModuleNotFoundError("No module named wrapt")'),
        'ModuleNotFoundError: No module named wrapt'),
    'wrapt is broken': (
        BREAK_MODULE.format(name='wrapt', error='OSError("bad shared object")'),
        'OSError: bad shared object'),
    'wrapt is too old': (
        'import wrapt; wrapt.__version__ = "1.13.3"',
        'ImportError: wrapt 1.13.3 is older than 1.14'),
    'wrapt is another module': (
        'import types; sys.modules["wrapt"] = types.ModuleType("wrapt")',
        "ImportError: cannot import name '__version__'"),
    'the models are broken': (
        BREAK_MODULE.format(name='timm_supervit.models', error='RuntimeError("no such operator")'),
        'RuntimeError: no such operator'),
    'the metadata is missing': (
        'import importlib.metadata as m\n'
        'find = m.distribution\n'
        'def distribution(name):\n'
        '    if name == "timm-supervit": raise m.PackageNotFoundError(name)\n'
        '    return find(name)\n'
        'm.distribution = distribution',
        'PackageNotFoundError'),
}

# Lets a module of timm end with a statement more.
CHANGE_MODULE = '''
import importlib.util
class Change:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            execute = spec.loader.exec_module
            def change(module):
                execute(module)
                {change}
            spec.loader.exec_module = change
            return spec
sys.meta_path.insert(0, Change())
'''

# What a release of timm could have other than the one this was written for, and what the warning says.
OTHER_TIMMS = {
    'no ClassificationTask': ('timm.task', 'del module.ClassificationTask', 'timm.task has no ClassificationTask'),
    'no TrainingTask': ('timm.task', 'del module.TrainingTask', 'timm.task has no TrainingTask'),
    'a ClassificationTask of another kind': ('timm.task', 'module.ClassificationTask = int', 'is no TrainingTask'),
    'no resume_task_checkpoint': (
        'timm.task', 'del module.resume_task_checkpoint', 'timm.task has no resume_task_checkpoint'),
    'no load_state_dict': (  # of its own; timm itself imports it from there
        'timm.models._helpers',
        'module.__getattr__ = dict(load_state_dict=vars(module).pop("load_state_dict")).get',
        'timm.models._helpers has no load_state_dict'),
    'no get_model_args': ('timm.models._hub', 'del module.get_model_args', 'timm.models._hub has no get_model_args'),
    'no create_dataset': ('timm.data', 'del module.create_dataset', 'timm.data has no create_dataset'),
    'no mixup_target': ('timm.data', 'del module.mixup.mixup_target', 'timm.data.mixup has no mixup_target'),
    'no posterize': ('timm.data.auto_augment', 'del module.posterize', 'timm.data.auto_augment has no posterize'),
    'no NAME_TO_OP': ('timm.data.auto_augment', 'del module.NAME_TO_OP', 'timm.data.auto_augment has no NAME_TO_OP'),
    'another posterize': ('timm.data.auto_augment', 'module.posterize = None', 'NAME_TO_OP has no operation posterize'),
}


def with_breakage(breakage: str) -> str:
    return USE_TIMM.format(breakage=BREAKAGES[breakage][0], autoload=AUTOLOAD)


def with_other_timm(other: str) -> str:
    module, change, _ = OTHER_TIMMS[other]
    return USE_TIMM.format(breakage=CHANGE_MODULE.format(module=module, change=change), autoload=AUTOLOAD)


TASK_IS_BROKEN = USE_TIMM.format(
    breakage=BREAK_MODULE.format(name='timm_supervit.training.task', error='RuntimeError("no such loss")'),
    autoload=AUTOLOAD)


def check_one_warning(answer: Any, *parts: str) -> list[str]:
    assert isinstance(answer, list), answer
    at_torch, at_timm, trained, listed = answer
    assert at_torch == []
    assert len(at_timm) == 1
    for part in parts:
        assert part in at_timm[0]
    assert 'pip install' in at_timm[0]
    assert trained
    return listed


@pytest.mark.parametrize(
    'breakage', rarely(BREAKAGES, {'wrapt is too old', 'the models are broken', 'the metadata is missing'}))
def test_what_is_broken_here_is_one_warning_when_timm_is_used(breakage: str, run_in_fork: Any) -> None:
    assert check_one_warning(run_in_fork(with_breakage(breakage)), BREAKAGES[breakage][1]) == []


@pytest.mark.parametrize('breakage', rarely(['wrapt is missing', 'wrapt is too old'], {'wrapt is missing'}))
def test_it_is_one_warning_where_timm_is_imported_before_torch(breakage: str) -> None:
    code, cause = BREAKAGES[breakage]
    answer, errors = run_python(USE_TIMM.format(breakage=code, autoload='pass') + 'print(json.dumps(answer))')
    assert check_one_warning(answer, cause) == []
    assert errors == ''


def test_a_broken_task_is_a_warning_and_leaves_timm_tasks_alone(run_in_fork: Any) -> None:
    assert set(MODELS) <= set(check_one_warning(run_in_fork(TASK_IS_BROKEN), 'no such loss'))


@pytest.mark.parametrize('other', rarely(
    OTHER_TIMMS, {'no ClassificationTask', 'no load_state_dict', 'no create_dataset', 'no NAME_TO_OP'}))
def test_a_timm_without_what_is_patched_works_as_alone_after_one_warning(other: str, run_in_fork: Any) -> None:
    module, _, cause = OTHER_TIMMS[other]
    listed = check_one_warning(
        run_in_fork(with_other_timm(other)), f'could not extend {module}, so that', f'(timm {timm.__version__})', cause)
    assert set(MODELS) <= set(listed)


def test_every_module_that_is_patched_is_tested_without_the_names_that_are() -> None:
    assert {patch.module for patch in PATCHES} == {module for module, _, _ in OTHER_TIMMS.values()}
