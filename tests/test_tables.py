"""Tables that no width cuts."""
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl

import pytest
from rich.console import Console

from timm_supervit.cli.tables import grid_table, list_table, print_table
from timm_supervit.results.rows import COLUMNS, Results, save_results

WIDTHS = (60, 80, 160)
COSTS = ['macs', 'latency_ms', 'latency_p90_ms', 'latency_iqr_ms', 'throughput', 'memory_mib']
NAMES = [letter * length for letter, length in (('J', 7), ('X', 28), ('Z', 70))]


def make_rows():
    return [
        dict(network=name, img_size=size, keep_rate=rate, top1=71.25 + i, macs=4.61e9 + 1e8 * i, latency_ms=1234.5 + i,
             latency_p90_ms=2345.25 + i, latency_iqr_ms=0.5 + i, throughput=28.5 + i, memory_mib=123.5 + i, file=name)
        for i, (name, size, rate) in enumerate(zip(NAMES, (128, 160, 224), (0.5, 0.7, 0.125), strict=True))]


def render(table, width):
    console = Console(width=width, force_terminal=False, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('columns', [
    ['network', *COSTS],  # profile
    ['img_size', 'keep_rate', 'top1', 'macs', 'latency_ms', 'throughput'],  # choose
    ['img_size', 'keep_rate', 'macs', 'memory_mib', 'throughput', 'file'],  # export
])
def test_every_number_and_name_is_there_at_every_width(columns, width):
    rows = make_rows()
    lines = render(list_table(rows, columns, title='a title'), width).splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].strip() == 'a title'
    words = ' '.join(lines).split()
    for row in rows:
        for key in columns:
            column = COLUMNS.get(key)
            if column:
                unit = 1e9 if key == 'macs' else 1
                shown = f'{row[key]:g}' if column.digits is None else f'{row[key] / unit:.{column.digits}f}'
                assert shown in words
    for word in ' '.join(COLUMNS[key].title for key in columns if key in COLUMNS).split():
        assert word in words
    assert '…' not in ' '.join(words)
    for name in NAMES if {'network', 'file'} & set(columns) else []:  # broken over lines, or not
        letters = ' '.join(lines).count(name[0])
        assert letters and letters % len(name) == 0


@pytest.mark.parametrize('width', WIDTHS)
def test_each_part_of_a_table_says_what_its_rows_are_about(width):
    columns = ['img_size', 'keep_rate', 'top1', *COSTS]
    lines = render(list_table(make_rows(), columns), width).splitlines()
    rules = [i for i, line in enumerate(lines) if '─' in line]
    assert len(rules) == (1 if width > 60 else 2)
    for rule in rules:
        below = [line.split()[:2] for line in lines[rule + 1:rule + 4]]
        assert below == [['128', '0.5'], ['160', '0.7'], ['224', '0.125']]


@pytest.mark.parametrize('width', WIDTHS)
def test_a_grid_of_many_rates_is_whole_at_every_width(width):
    rates = [round(0.02 * i, 2) for i in range(1, 51)]
    rows = [dict(img_size=224, keep_rate=rate, top1=90 + rate) for rate in rates]
    text = render(grid_table(rows, 'top1'), width)
    assert max(map(len, text.splitlines())) <= width
    words = text.split()
    assert all(f'{rate:g}' in words and f'{90 + rate:.2f}' in words for rate in rates)


def test_a_pipe_gets_one_line_for_each_row_however_long(capsys):
    rows = make_rows()
    print_table(list_table(rows, ['network', *COSTS, 'file']))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(rows) + 1
    for line, row in zip(lines[2:], rows, strict=False):
        assert line.count(row['network']) == 2
        assert f'{row["memory_mib"]:.1f}' in line
    print_table(*(grid_table(rows, key) for key in ['top1', *COSTS]))
    heading = capsys.readouterr().out.splitlines()[0]
    assert all(COLUMNS[key].title in heading for key in ['top1', *COSTS])


@pytest.mark.parametrize('width', WIDTHS)
def test_a_terminal_of_this_width_shows_every_column(width, tmp_path):
    path = tmp_path / save_results(Results('m', make_rows()), tmp_path, 'evaluate')
    parent, child = pty.openpty()
    ioctl(child, termios.TIOCSWINSZ, struct.pack('HHHH', 24, width, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ('COLUMNS', 'LINES')}
    environment['TERM'] = 'xterm'
    command = [sys.executable, '-m', 'timm_supervit', 'choose', path]
    with subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=environment) as process:
        os.close(child)
        shown = b''
        while not shown.endswith(b'224:0.125\r\n'):
            shown += os.read(parent, 4096)
    os.close(parent)
    text = re.sub(r'\x1b\[[\d;]*m', '', shown.decode())
    assert process.returncode == 0
    assert max(map(len, text.splitlines())) <= width
    for word in ('size', 'keep', 'rate', 'top-1', 'MACs', 'median', 'throughput', '0.125', '73.25', '4.81', '30.5'):
        assert word in text.split()
