"""The program that plans a run, as a user starts it: in a process of its own, with one device."""

import re

SHAPE = ("--config=shakespeare_char", "--config.model.vocab_size=48", "--config.model.num_layers=1",
         "--config.model.num_heads=2", "--config.model.model_dim=16", "--config.model.max_len=16",
         "--config.model.unroll=1", "--config.batch_size=8")


def test_two_devices_that_are_not_here(start):
    process = start("preflight", *SHAPE, "--config.mesh.fsdp=2", "--device=h100", "--nosearch")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "mesh: fsdp 2; compiled for cpu" in out and "h100: 80 GB, of which 90% are counted on: fits" in out
    assert re.search(r"^peak +0\.\d{3} GB a device$", out, re.M) and re.search(r"^v6e +32 GB +fits", out, re.M)


def test_a_vocabulary_that_is_not_known_is_one_line(start):
    process = start("preflight", "--config=shakespeare_char", "--device=h100")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 2 and out == ""
    assert err.splitlines()[-1] == ("error: the size of the vocabulary is unknown before the text is read; set "
                                    "model.vocab_size")
