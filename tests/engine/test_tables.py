"""Tables as text: what is aligned how, and figures with their decimals."""

from __future__ import annotations

from ssdd.engine.tables import Column, aligned, fixed, listed, markdown, print_head, print_row

HEADER, ROWS = ["decoder", "FID"], [["student-1", "12.5"], ["blur", "-"]]


def test_columns_are_as_wide_as_their_widest_cell():
    assert aligned(HEADER, ROWS).splitlines() == ["  decoder   FID", "student-1  12.5", "     blur     -"]
    named = ["decoder     FID", "---------------", "student-1  12.5", "blur          -"]
    assert aligned(HEADER, ROWS, named=True, ruled=True).splitlines() == named
    assert aligned(HEADER, []) == "decoder  FID"


def test_facts_and_markdown():
    assert listed({"size": "3 MB", "latent": "4 x 8 x 8"}) == "size    3 MB\nlatent  4 x 8 x 8"
    table = "| decoder | FID |\n|---|---|\n| student-1 | 12.5 |\n| blur | - |"
    assert markdown(HEADER, ROWS) == table


def test_rows_are_printed_one_by_one_with_their_scale_and_decimals(capsys):
    columns = (Column("what", "what", 6), Column("GiB", "bytes", 5, 1, 2**-30), Column("MFU %", "mfu", 6, 0, 100))
    print_head(columns)
    print_row(columns, {"what": "ours", "bytes": 3 * 2**29, "mfu": None, "more": 1})
    print_row(columns, {"what": "theirs", "bytes": 2**30, "mfu": 0.5})
    assert capsys.readouterr().out.splitlines() == [
        "what     GiB  MFU %",
        "ours     1.5      -",
        "theirs   1.0     50",
    ]
    assert (fixed(1.25, 1), fixed(None, 3)) == ("1.2", "-")
