"""Everything that this package changes in timm: one function for each place without a door.

A patch of timm takes the module that it hangs on, once timm has imported it. It looks up all it needs before it changes
anything, so one that fails leaves timm as it was; ``registration`` makes that failure a warning with its cause.
This file is imported with torch, so it imports neither torch nor timm.
"""
import functools
import sys
import warnings
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any, NamedTuple


class Patch(NamedTuple):
    """A change of timm.

    Attributes:
        module: The name of timm's module that it is applied to.
        apply: Takes that module.
        without: What users go without where it fails.
    """

    module: str
    apply: Callable[[Any], None]
    without: str


def create_supervit_task(tasks: Any) -> None:
    """Let ``ClassificationTask(model, ...)`` create the task of the model where the model is a SuperViT.

    Other tasks train its active subnet alone, and say so; where they meet label maps, they say what learns those.

    Why: ``train.py`` creates this class by name, and a model cannot choose its task. A data set does not know the task,
    and on label maps a criterion's error, of shapes or data types, does not tell what is wrong.
    Hangs on: ``timm.task.ClassificationTask``, and ``timm.task.TrainingTask.__new__``, which it inherits.
    Goes when: timm lets a model name its task, or registers tasks as it registers models.
    """
    classification_task, training_task = _look_up(tasks, 'ClassificationTask'), _look_up(tasks, 'TrainingTask')
    if not issubclass(classification_task, training_task):
        raise LookupError(f'{tasks.__name__}.ClassificationTask is no TrainingTask')
    create = training_task.__new__

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs.get('model', kwargs.get('student_model'))
        # Where the models are not loaded, there is no SuperViT; and what fails here must not stop other models' tasks.
        if model is not None and f'{__package__}.models.supervit' in sys.modules:
            try:
                cls = _choose_task(cls, model, classification_task)
            except Exception as error:
                warnings.warn(
                    f'timm-supervit could not look for the task of {type(model).__name__}, which trains as any model '
                    f'of timm: {type(error).__name__}: {error}. Run "pip install --upgrade timm-supervit".',
                    stacklevel=2)
        return object.__new__(cls) if create is object.__new__ else create(cls, *args, **kwargs)

    call = training_task.__call__

    @functools.wraps(call)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        target = args[1] if len(args) > 1 else kwargs.get('target')
        # Only where label maps were read, since tasks of one's own may have targets of any shape.
        if f'{__package__}.training.label_maps' in sys.modules and getattr(target, 'ndim', 0) == 3:
            from .training.token_labels import TokenLabelTask

            if not isinstance(self, TokenLabelTask):
                raise ValueError(
                    f'{type(self).__name__} of this model does not learn label maps; train a supervit_lvvit_* without '
                    f'--kd-model-name, or leave out --dataset label_maps')
        return call(self, *args, **kwargs)

    training_task.__new__ = staticmethod(new)
    training_task.__call__ = checked


def _choose_task(cls: type, model: Any, classification_task: type) -> type:
    from .models.supervit import find_supervit
    from .training.task import SuperViTTask

    supervit = find_supervit(model)
    if supervit is None or issubclass(cls, SuperViTTask):
        return cls
    if cls is classification_task:
        return resolve_name(supervit.task_class)
    if supervit.train_subnets != 'active':
        warnings.warn(
            f'{cls.__name__} trains only the active subnet {supervit.subnet} of this SuperViT. All subnets train in '
            f'ClassificationTask itself, as train.py without --kd-model-name creates it; '
            f'train_subnets=active says that one is meant.', stacklevel=4)
    return cls


def name_unreadable_checkpoint(tasks: Any) -> None:
    """Let resuming a SuperViT's task from a file that cannot be read say which file it is, and what to resume from.

    Why: timm reads the file before the task sees anything of it, and torch's message does not name it.
    Hangs on: ``timm.task.resume_task_checkpoint(task, checkpoint_path, ...)``.
    Goes when: timm's message names the file.
    """
    resume_task_checkpoint = _look_up(tasks, 'resume_task_checkpoint')

    @functools.wraps(resume_task_checkpoint)
    def resume(task: Any, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return resume_task_checkpoint(task, checkpoint_path, *args, **kwargs)
        except Exception as error:
            ours = sys.modules.get(f'{__package__}.training.task')
            if ours is None or not isinstance(task, ours.SuperViTTask) or isinstance(error, FileNotFoundError):
                raise
            raise RuntimeError(
                f'cannot resume from {checkpoint_path}: {error} '
                f'If the file was cut short, resume from the checkpoint before it.') from error

    tasks.resume_task_checkpoint = resume


def posterize_to_no_bits(auto_augment: Any) -> None:
    """Let RandAugment and AutoAugment posterize to 0 bits, which is an image of zeros, with Pillow 13 as before it.

    Why: timm asks Pillow for 0 bits where a magnitude reaches 10, one posterized image in 44 with the recipes'
    ``rand-m9-mstd0.5-inc1``. Pillow 13 refuses that, and neither magnitudes nor operations of a policy can be chosen.
    Hangs on: the operations in ``timm.data.auto_augment.NAME_TO_OP`` that are its function ``posterize``.
    Goes when: the oldest timm that we take asks for no 0 bits. Where timm and Pillow agree, it changes nothing.
    """
    from PIL import Image

    posterize, operations = _look_up(auto_augment, 'posterize'), _look_up(auto_augment, 'NAME_TO_OP')
    names = [name for name, operation in operations.items() if operation is posterize]
    if not names:
        raise LookupError(f'{auto_augment.__name__}.NAME_TO_OP has no operation posterize')
    try:
        posterize(Image.new('L', (1, 1)), 0)
    except ValueError:
        # A partial of two functions that modules have by name: workers that are spawned receive it by pickle.
        operations.update(dict.fromkeys(names, functools.partial(_posterize, posterize)))


def _posterize(posterize: Callable[..., Any], image: Any, bits_to_keep: int, **kwargs: Any) -> Any:
    if bits_to_keep > 0:
        return posterize(image, bits_to_keep, **kwargs)
    from PIL import Image

    return Image.new(image.mode, image.size)


def read_label_maps(data: Any) -> None:
    """Let ``create_dataset('label_maps/PATH', ...)`` add the label maps in a folder to the images of a training split.

    Why: ``train.py`` creates its data sets by this function, and the kinds that it knows are written out in it.
    Hangs on: ``timm.data.create_dataset(name, ..., is_training)``, and ``class_to_idx`` of timm's readers of folders.
    Goes when: timm lets a package register kinds of data sets.
    """
    create_dataset = _look_up(data, 'create_dataset')

    @functools.wraps(create_dataset)
    def create(name: str, *args: Any, **kwargs: Any) -> Any:
        kind, slash, label_root = name.partition('/')
        if not slash or kind.lower() != 'label_maps':
            return create_dataset(name, *args, **kwargs)
        dataset = create_dataset('', *args, **kwargs)
        if not kwargs.get('is_training'):
            return dataset
        from .training.label_maps import LabelMapDataset

        return LabelMapDataset(dataset, label_root, num_classes=1 + max(dataset.reader.class_to_idx.values()))

    data.create_dataset = create


def refuse_to_mix_label_maps(data: Any) -> None:
    """Refuse Mixup and CutMix on labels of tokens.

    Why: timm takes the target for class indices, rounds it, and trains on labels of which nearly all are class 0.
    Hangs on: ``timm.data.mixup.mixup_target(target, ...)``, by which ``Mixup`` and ``FastCollateMixup`` mix labels.
    Goes when: timm refuses what it does not mix.
    """
    mixup = _look_up(data, 'mixup')
    mixup_target = _look_up(mixup, 'mixup_target')

    @functools.wraps(mixup_target)
    def mix(target: Any, *args: Any, **kwargs: Any) -> Any:
        if target.ndim == 3:  # [B, classes, 2 + N]; those of images have one or two dimensions
            raise ValueError(
                'label maps cannot be mixed; leave out --mixup, --cutmix and --cutmix-minmax, or set them to 0 '
                '(LV-ViT mixes tokens itself)')
        return mixup_target(target, *args, **kwargs)

    mixup.mixup_target = mix


def name_averaged_weights(helpers: Any) -> None:
    """Warn where ``create_model(checkpoint_path=...)`` reads the averaged weights of an official DeiT checkpoint.

    Why: timm prefers them to the raw ones, of which the published accuracies are; in a run that was resumed they are
    those of a random start. A model is handed weights, and not the file that they are from.
    Hangs on: ``timm.models._helpers.load_state_dict(checkpoint_path, use_ema, ...)``, through which all routes pass.
    Goes when: timm warns itself, or hands on what it has read.
    """
    load_state_dict = _look_up(helpers, 'load_state_dict')

    @functools.wraps(load_state_dict)
    def load(checkpoint_path: Any, use_ema: bool = True, *args: Any, **kwargs: Any) -> Any:
        state_dict = load_state_dict(checkpoint_path, use_ema, *args, **kwargs)
        if use_ema and 'pos_embed_list.0' in state_dict and _is_official(checkpoint_path):
            warnings.warn(
                f'{checkpoint_path}: these are its averaged weights, model_ema; the published accuracies are of model, '
                f'which timm.models.load_checkpoint(model, path, use_ema=False) and "supervit convert" read',
                stacklevel=4)
        return state_dict

    helpers.load_state_dict = load


def leave_classes_to_config(hub: Any) -> None:
    """Let ``save_for_hf`` leave ``num_classes`` out of the ``model_args`` of a SuperViT, so that transformers reads it.

    Why: transformers creates the model by ``create_model(..., num_classes=N, **model_args)``, so twice is an error.
    timm itself takes the number from ``num_classes`` of the same file where ``model_args`` has none.
    Hangs on: ``timm.models._hub.get_model_args(model, ...)``, which writes it there for every model.
    Goes when: timm leaves it out, or transformers takes it once.
    """
    get_model_args = _look_up(hub, 'get_model_args')

    @functools.wraps(get_model_args)
    def get(model: Any, *args: Any, **kwargs: Any) -> Any:
        model_args = get_model_args(model, *args, **kwargs)
        ours = sys.modules.get(f'{__package__}.models.supervit')
        if ours is not None and isinstance(model, ours.SuperViT):
            model_args.pop('num_classes', None)
        return model_args

    hub.get_model_args = get


def _is_official(checkpoint_path: Any) -> bool:
    import argparse

    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(checkpoint_path, map_location='meta', weights_only=True)
    except Exception:  # it was just read, by rules of timm's
        return False
    return {'model', 'model_ema'} <= checkpoint.keys()


def _look_up(module: Any, name: str) -> Any:
    # Python itself would suspect a circular import, since the module is still being imported.
    if name not in vars(module):
        raise AttributeError(f'{module.__name__} has no {name}')
    return vars(module)[name]


PATCHES = (
    Patch('timm.task', create_supervit_task, 'ClassificationTask trains the active subnet of a SuperViT alone'),
    Patch('timm.task', name_unreadable_checkpoint, 'resuming from a damaged checkpoint does not name the file'),
    Patch('timm.models._helpers', name_averaged_weights, 'nothing says which weights of an official file are read'),
    Patch('timm.models._hub', leave_classes_to_config, 'transformers does not read what save_for_hf writes'),
    Patch('timm.data', refuse_to_mix_label_maps, 'Mixup and CutMix spoil label maps without a word'),
    Patch('timm.data', read_label_maps, 'train.py knows no --dataset label_maps/PATH'),
    Patch('timm.data.auto_augment', posterize_to_no_bits, 'RandAugment fails now and then with Pillow 13'),
)
