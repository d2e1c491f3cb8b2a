"""Text from files stays text: in terminals, tables, pictures, model cards and spreadsheets."""
import csv
import html
import json
import re

import pytest
import timm
from click.testing import CliRunner
from markdown_it import MarkdownIt
from matplotlib.text import Text
from PIL import Image

from timm_supervit.cli import main
from timm_supervit.cli.stdout import echo
from timm_supervit.cli.tables import list_table, print_table
from timm_supervit.results.pictures import draw_operating_points
from timm_supervit.results.rows import Results, load_results, save_results
from timm_supervit.results.text import markdown, spreadsheet, visible
from timm_supervit.tools.convert import model_card

# What a name may hold, and how it is shown.
NAMES = {
    'plain größe 数 é': 'plain größe 数 é',
    '\x1b[31mred\x1b[0m\x07\x9b2J': r'\x1b[31mred\x1b[0m\x07\x9b2J',
    'two\nlines\r\tand\u2028more': r'two\nlines\r\tand\u2028more',
    'from right \u202eto left\u2066': r'from right \u202eto left\u2066',
    'a file \udcff name': r'a file \udcff name',
    '[bold]markup[/bold] [link=x]y[/link] [ms] [/]': '[bold]markup[/bold] [link=x]y[/link] [ms] [/]',
    ':smile: \\[': ':smile: \\[',
    r'$\frac{1}$ and $x_1$': r'$\frac{1}$ and $x_1$',
    '<script>alert(1)</script> &amp; <!-- |x| -->': '<script>alert(1)</script> &amp; <!-- |x| -->',
    '[a](http://b) ![c](d) `e` *f* _g_ ~h~ # i | j \\| k': '[a](http://b) ![c](d) `e` *f* _g_ ~h~ # i | j \\| k',
}
every_name = pytest.mark.parametrize(('name', 'shown'), NAMES.items(), ids=range(len(NAMES)))


def row(name):
    return dict(img_size=12, keep_rate=0.5, image=name, prediction=name, macs=7, probability=0.5)


@every_name
def test_names_are_shown_and_not_obeyed(name, shown):
    assert visible(name) == shown
    assert shown.isprintable()


@every_name
def test_a_terminal_shows_names_in_tables_and_messages(name, shown, capsys):
    print_table(list_table([row(name)], ['image', 'prediction', 'macs'], title=name))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].strip() == shown
    assert (len(printed), printed[3].count(shown)) == (5, 2)
    echo(visible(name))
    assert capsys.readouterr().out == f'{shown}\n'


def test_a_unit_in_brackets_is_no_markup(capsys):
    print_table(list_table([dict(image='x', latency_ms=1.0, throughput=2.0)], ['image', 'latency_ms', 'throughput']))
    assert 'latency, median [ms]  throughput [images/s]' in capsys.readouterr().out


@every_name
def test_a_cell_of_markdown_is_the_name_and_nothing_else(name, shown):
    table = f'| a | b |\n| --- | --- |\n| {markdown(name)} | 1 |\n'
    rendered = MarkdownIt('commonmark').enable(['table', 'strikethrough']).render(table)
    assert [html.unescape(cell) for cell in re.findall('<td>(.*?)</td>', rendered, re.DOTALL)] == [shown, '1']


@every_name
def test_a_model_card_is_whole_whatever_the_names_in_it(name, shown):
    model = timm.create_model('supervit_digits', embed_dim=48, depth=2, drop_layers=(1,))
    rows = [dict(img_size=12, keep_rate=0.5, precision=name, macs=7)]
    card = model_card(model, f'local-dir:{name.replace("/", "")}', Results('supervit_digits', rows))
    rendered = MarkdownIt('commonmark').enable('table').render(card.text)
    expected = html.escape(shown, quote=False)
    assert re.findall('<td[^>]*>(.*?)</td>', rendered, re.DOTALL)[2] == expected
    assert f'<h1>{expected.replace("/", "")}</h1>' in rendered
    code = re.search('<code class="language-python">(.*?)</code>', rendered, re.DOTALL)[1]
    compile(html.unescape(code), 'card', 'exec')


@pytest.mark.parametrize('name', [*NAMES, '=1+1', '+1', '-1', '@SUM(A1)', ' =1', '\t=1', '=cmd|x', '"', 'a,b'])
def test_a_spreadsheet_gets_one_line_for_each_row_and_no_formula(name, tmp_path):
    save_results(Results('m', [row(name), {name: name, **row(name)}]), tmp_path, 'visualize')
    with (tmp_path / 'visualize.csv').open(encoding='utf-8', newline='') as file:
        lines = file.read().split('\n')
    assert len(lines) == 4 and not lines[-1]
    for line in csv.reader(lines[:-1]):
        assert not any(cell.lstrip().startswith(('=', '+', '-', '@')) for cell in line)
    assert next(csv.reader(lines[1:]))[2].lstrip("'") == visible(name)


def test_text_is_in_quotes_since_some_spreadsheets_part_cells_at_semicolons(tmp_path):
    save_results(Results('m', [row('a;=1')]), tmp_path, 'visualize')
    assert (tmp_path / 'visualize.csv').read_text().splitlines()[1] == '12,0.5,"a;=1","a;=1",7,0.5'


def test_numbers_in_a_spreadsheet_stay_numbers(tmp_path):
    save_results(Results('m', [dict(row('x'), change=-1.5, none=None)]), tmp_path, 'visualize')
    assert (tmp_path / 'visualize.csv').read_text().splitlines()[1] == '12,0.5,"x","x",7,0.5,-1.5,""'
    assert spreadsheet('-1.5') == "'-1.5"


@every_name
def test_a_picture_shows_names_and_no_mathematics(name, shown):
    rows = [dict(img_size=12, keep_rate=0.5, macs=7, top1=80.0), dict(model=name, macs=7, top1=80.0)]
    figure = draw_operating_points(rows, title=name)
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    assert [text.get_text() for text in texts].count(shown) == 2
    assert not any(text.get_parse_math() for text in texts)


@every_name
def test_class_names_and_file_names_go_through_visualize_as_text(name, shown, tmp_path):
    model = timm.create_model('supervit_digits', embed_dim=48, depth=2, drop_layers=(1,), num_classes=2)
    timm.models.save_for_hf(model, str(tmp_path / 'model'), safe_serialization=True)
    config = json.loads((tmp_path / 'model' / 'config.json').read_text())
    config['label_names'] = [name, name]
    (tmp_path / 'model' / 'config.json').write_text(json.dumps(config))
    image = tmp_path / f'{name.replace("/", "")}.png'
    Image.new('RGB', (24, 24)).save(image)
    result = CliRunner().invoke(main, [
        'visualize', f'local-dir:{tmp_path / "model"}', str(image), '--subnet', '12:0.5', '--device', 'cpu',
        '--output', str(tmp_path / 'out')])
    assert result.exit_code == 0, result.output
    assert shown in result.stdout
    assert shown.replace('/', '') in result.stdout
    found, = load_results(tmp_path / 'out' / 'visualize.json').rows
    assert (found['prediction'], found['image']) == (name, image.stem)


@every_name
def test_errors_show_names_and_do_not_obey_them(name, shown, tmp_path):
    path = tmp_path / name.replace('/', '')
    path.write_text('no results')
    result = CliRunner().invoke(main, ['choose', str(path)])
    assert result.exit_code == 1
    assert shown.replace('/', '') in result.stderr.replace('\n', r'\n').replace('\t', r'\t')
    assert not re.search('[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]', result.stderr)


def test_line_breaks_of_a_message_can_be_kept():
    assert visible('a\n\tb\x1b', keep='\n\t') == 'a\n\tb\\x1b'
