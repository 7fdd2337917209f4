"""Folders of pictures: what belongs together, what is said of bad ones, and what becomes of the pixels."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aquabit.inputs import PIXELS, Inputs, read_inputs
from aquabit.scheme import AquabitError, Calibration, Protocol, QuantConfig, digest
from aquabit.study import Study
from tests.tiny_inputs import pictures


def test_files_that_belong_together(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 3, masks=True, texts=True)
    (folder / "cat1.png").rename(folder / "cat10.png")
    (folder / "cat1.mask.png").rename(folder / "cat10.mask.PNG")
    (folder / "cat1.txt").rename(folder / "cat10.txt")
    (folder / ".hidden.png").write_text("no picture")
    (folder / "notes.md").write_text("")
    (folder / "more").mkdir()
    found = read_inputs(folder)
    assert [name for name, _ in found.pictures] == ["cat0.png", "cat2.png", "cat10.png"]
    assert found.roles == ("mask",) and found.texts() == ("cat a", "cat c", "cat b")
    assert len({pixels for _, pixels in found.pictures}) == 3
    loaded = found.load(4, (16, 32))  # the second again
    assert loaded[""].size == (32, 16) == loaded["mask"].size
    assert (loaded[""].mode, loaded["mask"].mode) == ("RGB", "L")


def test_pictures_are_cut_in_the_centre_and_not_stretched(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255  # a white square in the middle
    Image.fromarray(wide).save(tmp_path / "a.png")
    inputs = read_inputs(tmp_path)
    assert (np.asarray(inputs.load(0, (20, 20))[""]) == 255).all()
    upright = Image.fromarray(wide)
    exif = upright.getexif()
    exif[0x0112] = 6  # turned by a quarter
    upright.save(tmp_path / "a.png", exif=exif)
    assert read_inputs(tmp_path).load(0, (30, 10))[""].size == (10, 30)
    assert read_inputs(tmp_path) != inputs


def test_the_place_is_no_part_of_what_is_measured(tmp_path: Path) -> None:
    one, other = (read_inputs(pictures(tmp_path / name)) for name in "ab")
    assert one.folder != other.folder and one.identity == other.identity
    assert Protocol(inputs=one).digest == Protocol(inputs=other).digest != Protocol().digest
    changed = Image.open(tmp_path / "b" / "cat1.png")
    changed.putpixel((0, 0), (1, 2, 3))
    changed.save(tmp_path / "b" / "cat1.png")
    assert Protocol(inputs=read_inputs(tmp_path / "b")).digest != Protocol(inputs=one).digest
    with pytest.raises(
        AquabitError, match=r"cat1\.png, or what belongs to it, has changed since it was read"
    ):
        other.load(1, (7, 7))
    (tmp_path / "b" / "cat2.png").unlink()
    with pytest.raises(AquabitError, match=r"cat2\.png is not there; put it back, or say where it is by"):
        other.load(2, (7, 7))
    other.load(0, (7, 7))


def test_they_come_back_from_files(tmp_path: Path) -> None:
    inputs = read_inputs(pictures(tmp_path / "p", masks=True))
    protocol = Protocol(inputs=inputs, strength=0.5)
    assert Protocol.from_dict(protocol.to_dict()) == protocol
    config = QuantConfig("f", {}, calibration=Calibration.of(replace(protocol, images=2)))
    assert QuantConfig.from_dict(config.to_dict()) == config and config.calibration is not None
    assert config.calibration.inputs == inputs and config.calibration.strength == 0.5
    few = replace(config.calibration, images=2).inputs  # no more are used
    assert few is not None and few.pictures == inputs.pictures[:2]
    assert inputs.public.folder == "p" and inputs.public.identity == inputs.identity
    assert inputs.turned(range(2, 6)).pictures == tuple(inputs.pictures[i] for i in (2, 0, 1, 2))
    assert Calibration().to_dict().keys() & {"inputs", "strength"} == set()  # digests stay what they were
    assert Calibration().digest == digest(Calibration().to_dict())


def begin(study: Study, protocol: Protocol) -> None:
    space = {"choices": {}, "calibration": Calibration.of(protocol).to_dict()}
    study.begin("model", "f", {}, space, protocol)


def test_a_study_goes_on_where_pictures_were_moved_and_not_where_they_changed(tmp_path: Path) -> None:
    first = read_inputs(pictures(tmp_path / "p"))
    study = Study(tmp_path / "s.db")
    begin(study, Protocol(inputs=first))
    (tmp_path / "p").rename(tmp_path / "elsewhere")
    moved = Protocol(inputs=read_inputs(tmp_path / "elsewhere"))
    begin(study, moved)
    assert study.protocol == moved
    assert study.get("space")["calibration"]["inputs"]["folder"] == str(tmp_path / "elsewhere")
    for inputs, said in (
        (None, r"--inputs of some pictures"),
        (read_inputs(pictures(tmp_path / "fewer", 2)), r"the picture cat2\.png is another"),
        (first.turned((1, 0, 2)), "pictures in another order"),
    ):
        with pytest.raises(AquabitError, match=rf"measured under another protocol \({said}\); use the same"):
            begin(study, Protocol(inputs=inputs))
    plain = Study(tmp_path / "t.db")
    begin(plain, Protocol())
    with pytest.raises(AquabitError, match=r"protocol \(no --inputs\); use the same"):
        begin(plain, moved)


BAD = {  # what is done to a folder of three cats with masks and texts, and what is said
    "empty": "hold no pictures",
    "no folder": "are no folder; give one that holds pictures",
    "not a picture": r"cat1\.png is no picture that can be read",
    "damaged": r"cat1\.png cannot be read as a picture",
    "mask without picture": r"cat1\.mask\.png is the mask of a picture cat1, which is not there",
    "text without picture": r"dog\.txt is the text of a picture dog, which is not there",
    "mask missing": r"has a mask of cat0 and none of cat1\.png; give all pictures one",
    "sizes differ": r"cat1\.mask\.png has 5 x 5 pixels and its picture cat1\.png 28 x 24; a mask must",
    "another encoding": r"cat1\.txt cannot be read as UTF-8 text",
    "text missing": r"has cat0\.txt and no cat1\.txt; give every picture a text, or all of them by",
    "text empty": r"cat1\.txt is empty",
    "link to itself": r"cat1\.png cannot be read as a picture: Too many levels",
    "folder linked to itself": "are no folder",
    "huge": r"cat1\.png is too large; a picture may have 134,217,728 pixels",
    "two of a name": r"has both cat1\.jpg and cat1\.png; remove one",
    "of a kind that is not read": r"dog\.heic is of a kind that is not read",
    "16 bits": r"cat1\.png has I;16 pixels; give it 8 bits a channel",
    "unreadable": "cannot be read: Permission denied",
}


def spoilt(folder: Path, how: str) -> Path:
    cat, mask, text = (folder / f"cat1{end}" for end in (".png", ".mask.png", ".txt"))
    if how in ("empty", "no folder"):
        for file in folder.iterdir():
            file.unlink()
        return folder if how == "empty" else folder / "none"
    if how == "folder linked to itself":
        (folder / "loop").symlink_to("loop")
        return folder / "loop"
    if how == "not a picture":
        cat.write_text("hello")
    elif how == "damaged":
        cat.write_bytes(cat.read_bytes()[:60])
    elif how == "mask without picture":
        cat.unlink()
        text.unlink()
    elif how == "text without picture":
        text.rename(folder / "dog.txt")
    elif how == "mask missing":
        mask.unlink()
    elif how == "sizes differ":
        Image.new("L", (5, 5)).save(mask)
    elif how == "another encoding":
        text.write_bytes("chât".encode("latin-1"))
    elif how == "text missing":
        text.unlink()
    elif how == "text empty":
        text.write_text(" \n")
    elif how == "link to itself":
        cat.unlink()
        cat.symlink_to("cat1.png")
    elif how == "huge":
        Image.new("1", (20000, 20000)).save(cat)
    elif how == "two of a name":
        Image.new("RGB", (5, 5)).save(cat.with_suffix(".jpg"))
    elif how == "of a kind that is not read":
        (folder / "dog.heic").write_bytes(b"")
    elif how == "16 bits":
        Image.fromarray(np.zeros((24, 28), np.uint16)).save(cat)
    elif how == "unreadable":
        folder.chmod(0)
    return folder


@pytest.mark.filterwarnings("ignore")  # PIL's own, of large pictures
@pytest.mark.parametrize("how", BAD)
def test_bad_folders_are_said_in_one_sentence(how: str, tmp_path: Path) -> None:
    if how == "unreadable" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    folder = spoilt(pictures(tmp_path / "p", masks=True, texts=True), how)
    with pytest.raises(AquabitError, match=BAD[how]) as said:
        read_inputs(folder).texts()
    assert "\n" not in str(said.value)
    assert PIXELS < 20000**2


def test_inputs_that_name_nothing() -> None:
    for given in ({"pictures": ()}, {"pictures": (("a.png", "0"),), "roles": ("hat",)}):
        with pytest.raises(AquabitError, match="name no pictures, or roles that are unknown"):
            Inputs("p", **given)  # type: ignore[arg-type]
