"""The autotuner without a device: the table as text, candidates within the header's limits, commands, the choice."""

import subprocess
from dataclasses import replace

import pytest
import torch

from benchmarks import autotune
from benchmarks.__main__ import main
from benchmarks.autotune import Timed

TEXT = autotune.TABLE.read_text()
TILES = autotune.read(TEXT)


def test_the_table_survives_reading_and_writing():
    assert len(TILES) == TEXT.split("kTiles[] = {")[1].split("};")[0].count("},")
    assert autotune.write(TEXT, TILES) == TEXT
    other = [replace(TILES[0], stages=5), *TILES[1:]]
    changed = autotune.write(TEXT, other, [f"note {i}" for i in range(len(TILES))])
    assert autotune.read(changed) == other
    assert f"    {other[0].source()}  // note 0\n" in changed


def test_candidates_are_those_that_fit():
    found = autotune.candidates(TILES)
    for tile, of_entry in zip(TILES, found, strict=True):
        assert of_entry[0] == tile
        assert 1 < len(of_entry) == len(set(of_entry))
        assert autotune.fitting(of_entry) == of_entry
    tile = next(tile for tile in TILES if tile.kernel == "kSums")
    wrong = [
        replace(tile, rows=256, k_tiles=8),  # 256 KiB of rows
        replace(tile, stages=3),  # fewer than are in flight
        replace(tile, kernel="kLseBwd", splits=2, rows=128, columns=128, stage_k_tiles=2),  # 256 registers of 192
        replace(tile, columns=96),
        replace(
            tile, kernel="kLseBwd", splits=1, k_tiles=1, rows=128, stage_k_tiles=2
        ),  # a stage of two k_tiles for one
    ]
    assert autotune.fitting([*wrong, tile]) == [tile]


def test_an_entry_that_does_not_fit_does_not_compile(tmp_path):
    def compiles(tiles):
        header = tmp_path / "table.cpp"
        header.write_text(autotune.write(TEXT, tiles))
        return subprocess.run(["g++", "-std=c++17", "-fsyntax-only", header], capture_output=True, text=True)

    assert compiles(TILES).returncode == 0
    refused = compiles([replace(TILES[0], rows=256, k_tiles=6), *TILES[1:]])
    assert refused.returncode != 0
    assert "an entry of kTiles exceeds" in refused.stderr


def test_problems_are_answered_by_the_entry_that_is_timed():
    for at, tile in enumerate(TILES):
        asked = autotune.problems(TILES, at)
        assert asked
        for splits, k_tiles, _ in asked:
            taken = next(
                t for t in TILES if t.kernel == tile.kernel and t.splits in (0, splits) and k_tiles <= t.k_tiles
            )
            assert taken == tile
    assert autotune.kernel_number("kSums") == "0"
    assert autotune.kernel_number("kLseBwd") == "2"


def test_a_candidates_table_hides_the_source(tmp_path):
    command = autotune.compile_command("nvcc", tmp_path)
    folders = [part for part in command if part.startswith("-I")]
    assert folders == [f"-I{tmp_path}", f"-I{autotune.ROOT / 'csrc'}"]
    assert "-gencode=arch=compute_90a,code=sm_90a" in command
    assert all((autotune.ROOT / source).exists() for source in autotune.SOURCES)
    assert not any(autotune.SHARE in part for part in command)
    assert f"-D{autotune.SHARE}=2" in autotune.compile_command("nvcc", tmp_path, 2)
    assert f"#define {autotune.SHARE} 0\n" in TEXT


def test_the_share_of_exponentials():
    timed = [[Timed(ms, 1.0), Timed(2.0, 1.0)] for ms in (1.0, 0.9, 0.5, 1.5)]
    assert autotune.share_line(timed) == (
        f"#define {autotune.SHARE} 2  "
        "// time with so many of eight, by that with none: 0: 1.000, 1: 0.950, 2: 0.750, 3: 1.250"
    )


def test_the_fastest_that_is_right_wins():
    own = [Timed(2.0, 10.0), Timed(4.0, -7.0)]
    faster = [Timed(1.0, 10.001), Timed(3.9, -7.0)]
    wrong = [Timed(0.1, 10.0), Timed(0.1, -7.1)]
    noise = [Timed(1.98, 10.0), Timed(3.98, -7.0)]
    broken = [Timed(0.1, float("nan")), Timed(0.1, -7.0)]
    assert autotune.choose([own, noise, wrong]) == 0
    assert autotune.choose([own, noise, wrong, faster, broken]) == 3
    assert autotune.note(TILES, 0, [own, faster], 1) == (
        "1.000 ms at D = 128, 3.900 ms at D = 256 (2.000, 4.000 before)"
    )


def test_what_the_binary_prints(tmp_path):
    """A stand-in that answers every problem with the sum of its four numbers."""
    binary = tmp_path / "autotune"
    binary.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do echo "0.5 $(($1 + $2 + $3 + $4))"; shift 4; done\n')
    binary.chmod(0o755)
    rows = autotune.ROWS
    assert autotune.run(binary, TILES, [0, 3]) == {
        0: [Timed(0.5, 0 + 1 + 2 + rows), Timed(0.5, 0 + 1 + 4 + rows)],
        3: [Timed(0.5, 2 + 1 + 1 + rows)],
    }
    binary.write_text("#!/bin/sh\necho the kernel: bad >&2\nexit 1\n")
    with pytest.raises(ValueError, match="a candidate failed on the device: the kernel: bad"):
        autotune.run(binary, TILES, [0])


NVCC = """#!/bin/sh
for output; do :; done
cat > "$output" <<'binary'
#!/bin/sh
ms=0.5
grep -q '{kTopk, 0, 4, 256, 128, 1, 4, 1}' "$(dirname "$0")/cuda/tile_sizes_sm90.h" && ms=0.4
while [ $# -gt 0 ]; do echo "$ms 1"; shift 4; done
binary
chmod +x "$output"
"""


def test_from_candidates_to_the_table(tmp_path):
    """A stand-in for the compiler, whose binaries are fast where the table has four stages for the top-k kernel."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    tuned = autotune.tune(str(nvcc), tmp_path / "tiles", 1)
    at = next(i for i, tile in enumerate(TILES) if tile.kernel == "kTopk")
    chosen = autotune.read(tuned)[at]
    assert chosen == replace(TILES[at], stages=4)
    assert f"    {chosen.source()}  // 0.400 ms at D = 128, 0.400 ms at D = 256 (0.500, 0.500 before)\n" in tuned
    assert autotune.tune_share(str(nvcc), tmp_path / "shares", 1, TEXT).startswith(f"#define {autotune.SHARE} 0  //")


def test_without_a_device_it_says_so_in_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["autotune"]) == 2
    assert capsys.readouterr().err == (
        "python -m benchmarks autotune: needs a CUDA device of compute capability 9.0, and there is none here\n"
    )
