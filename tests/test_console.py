"""Long work where nobody sees a bar."""

from __future__ import annotations

from kvpred_mlx import console


def test_a_line_now_and_then(monkeypatch, capsys):
    """What it is, how far it is, and how long it will take: at most every twenty seconds."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: False, raising=False)
    with console.progress_bar("fitting") as progress:
        for done in range(1, 11):
            now[0] += 12
            progress(done, 10)
        progress(0, 4, "measuring")
        now[0] += 30
        progress(1, 4, "measuring")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["fitting: 2 of 10, 1.6 min left", "fitting: 4 of 10, 1.2 min left"]
    assert len(lines) == 6 and lines[-1] == "measuring: 1 of 4, 1.5 min left"
