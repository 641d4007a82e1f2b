"""tools.show: the trained tokens marked."""

import json

from conftest import character_tokenizer

from nanopcf.tools.show import show


def test_show_marks_what_is_trained(model_dir, tmp_path):
    from conftest import run_script

    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(dict(prompt="1+1=", trajectory="2")))
    command = ["-m", "nanopcf.tools.show", "--model", str(model_dir), "--data", str(path)]
    done = run_script(*command)
    assert done.stdout == "1·+·1·=[[2·<end>]]\n" and "(4 tokens given, 2 trained)" in done.stderr
    assert show(character_tokenizer(), [1, 2, 3], 1, colour=True) == "1\x1b[32m2·3\x1b[0m"
