"""The training recipes: YAML files that timm's ``train.py -c`` reads, kept beside this package's code."""
from importlib.resources import files

_FOLDER = files('timm_supervit') / 'recipes'


def recipe_names() -> list[str]:
    """Return the names of all recipes, sorted."""
    return sorted(file.name.removesuffix('.yaml') for file in _FOLDER.iterdir() if file.name.endswith('.yaml'))


def recipe(name: str) -> str:
    """Return a recipe as YAML text."""
    if name not in recipe_names():
        raise ValueError(f'recipe {name!r} is unknown; use one of {", ".join(recipe_names())}')
    return (_FOLDER / f'{name}.yaml').read_text(encoding='utf-8')
