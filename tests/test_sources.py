import re

import pytest

from cluster.errors import UserError
from data_pipeline.config import SourceConfig
from data_pipeline.sources import read_source
from tests.raw import pattern, save, table_source, write_csv


def folder_of(tmp_path, names):
    for number, name in enumerate(names):
        save(tmp_path / name, pattern(number))
    return tmp_path


def with_table(tmp_path, names, rows, columns=("image", "label", "group"), **settings):
    folder_of(tmp_path, names)
    write_csv(tmp_path / "labels.csv", list(columns), rows)
    return SourceConfig(path=str(tmp_path), labels="labels.csv", **settings)


def test_class_folders_give_label_key_and_a_group_of_its_own(tmp_path):
    names = ["mel/a.jpg", "mel/2019/b.x.JPG", "nv/a.jpeg", "nv/c.PNG", "nv/d.webp", "nv/e.tif", "nv/f.TIFF", "nv/g.bmp"]
    folder_of(tmp_path, names)
    (tmp_path / "nv" / "notes.txt").write_text("no image")
    save(tmp_path / "nv" / ".cache" / "h.jpg", pattern(99))
    samples = read_source(SourceConfig(path=str(tmp_path)))
    assert [sample.name for sample in samples] == sorted(names)
    assert {sample.name: sample.label for sample in samples} == {name: name[: name.index("/")] for name in names}
    assert [sample.key for sample in samples][:3] == ["mel__2019__b_x", "mel__a", "nv__a"]
    assert all(sample.group == sample.name and str(sample.place) == str(tmp_path / sample.name) for sample in samples)


def test_files_that_are_no_images_by_their_suffix_are_told(tmp_path, caplog):
    folder_of(tmp_path, ["mel/a.jpg", "nv/b.jpg"])
    (tmp_path / "mel" / ".hidden").write_bytes(b"")
    assert len(read_source(SourceConfig(path=str(tmp_path)))) == 2 and not caplog.messages
    for name in ("nv/c.heic", "readme.txt", "mel/d", "nv/Thumbs.db"):
        (tmp_path / name).write_bytes(b"")
    assert len(read_source(SourceConfig(path=str(tmp_path)))) == 2
    (message,) = caplog.messages
    said = f"passed over 4 files in {tmp_path} (mel/d, nv/Thumbs.db, nv/c.heic, ...), no image by its suffix; an image"
    assert message.startswith(said) and message.endswith(".tif .tiff .webp")


def test_keys_that_would_collide_are_told_apart_whatever_else_is_there(tmp_path):
    folder_of(tmp_path, ["a/x.jpg", "a/x.png", "a/y.z.jpg", "a/y_z.jpg", "b/X.jpg", "b/x.jpg", "b/q.jpg"])
    keys = {sample.name: sample.key for sample in read_source(SourceConfig(path=str(tmp_path)))}
    assert len(set(keys.values())) == 7
    assert keys["b/q.jpg"] == "b__q"
    assert re.fullmatch(r"a__x~[0-9a-f]{12}", keys["a/x.jpg"])
    assert not any("." in key or "/" in key for key in keys.values())
    (tmp_path / "b" / "q.jpg").unlink()
    assert {sample.name: sample.key for sample in read_source(SourceConfig(path=str(tmp_path)))}.items() <= keys.items()


def test_the_image_column_takes_stems_names_and_paths_in_sub_folders(tmp_path):
    names = ["part1/a.jpg", "part2/b.png", "c.jpg", "part2/d.jpg", "part1/e.jpg"]
    rows = [
        ("a", "x", "p1"),
        ("b.png", "y", "p1"),
        ("c", "x", ""),
        ("part2/d.jpg", "y", "p2"),
        ("./part1/e", "x", " p2 "),
    ]
    samples = read_source(with_table(tmp_path, names, rows, group_column="group"))
    found = {sample.name: (sample.label, sample.group) for sample in samples}
    assert found == {
        "part1/a.jpg": ("x", "p1"),
        "part2/b.png": ("y", "p1"),
        "c.jpg": ("x", "c.jpg"),  # no group given: one of its own
        "part2/d.jpg": ("y", "p2"),
        "part1/e.jpg": ("x", "p2"),
    }


def test_own_column_names_and_a_byte_order_mark(tmp_path):
    folder_of(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "meta.csv").write_text("image_id,dx,lesion\na,nv,L1\nb,mel,L2\n", encoding="utf-8-sig")
    source = SourceConfig(
        path=str(tmp_path), labels="meta.csv", image_column="image_id", label_column="dx", group_column="lesion"
    )
    assert [(s.label, s.group) for s in read_source(source)] == [("nv", "L1"), ("mel", "L2")]


def test_the_order_of_the_rows_does_not_matter(tmp_path):
    source = table_source(tmp_path, {"a": 4, "b": 3})
    first = read_source(source)
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert read_source(source) == first


def test_listed_only_passes_over_images_without_a_row(tmp_path):
    source = with_table(tmp_path, ["a.jpg", "b.jpg", "c.jpg"], [("a", "x", ""), ("b", "y", "")])
    assert [sample.name for sample in read_source(source, listed_only=True)] == ["a.jpg", "b.jpg"]


ABC = ["a.jpg", "b.jpg", "c.jpg"]
GOOD = [("a", "x", ""), ("b", "y", ""), ("c", "y", "")]


@pytest.mark.parametrize(
    "names, rows, message",
    [
        (
            ABC,
            [*GOOD, *((f"m{i}", "x", "") for i in range(5))],
            "{table}: 5 rows without an image (m0, m1, m2, ...); add the images below source.path, or take "
            "the rows out",
        ),
        (ABC, [*GOOD, ("", "x", "")], "{table}: 1 row without an image (''); add the images below source.path"),
        (
            [*ABC, "d.jpg", "e.jpg"],
            GOOD,
            "{table}: 2 images in {root} without a row (d.jpg, e.jpg); add rows for them, or move them out "
            "of the folder",
        ),
        (
            ABC,
            [GOOD[0], ("b", " ", ""), ("c", "", "")],
            "{table}: 2 rows without a label (b, c); fill the column in, or take the rows and their images out",
        ),
        (ABC, [*GOOD, ("a.jpg", "x", "")], "{table}: 1 image listed more than once (a.jpg); keep one row an image"),
        (
            ["p/a.jpg", "q/a.png", *ABC[1:]],
            GOOD,
            "{table}: image 'a' is ambiguous, p/a.jpg and q/a.png both fit; write the path with its folder and suffix",
        ),
        (ABC, [("a", "x", ""), ("b", "x", ""), ("c", "x", "")], "source {root} has one class only, 'x'; a classifier"),
        (ABC, [], "{table} has no rows; add one an image"),
    ],
)
def test_rows_and_images_that_do_not_fit(tmp_path, names, rows, message):
    source = with_table(tmp_path, names, rows)
    with pytest.raises(UserError) as error:
        read_source(source)
    assert message.format(table=tmp_path / "labels.csv", root=tmp_path) in str(error.value)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError) as error:
        read_source(SourceConfig(path=str(tmp_path / "nowhere")))
    assert str(error.value) == (
        f"source.path = {tmp_path}/nowhere: there is no such folder; give the folder with the images"
    )


def test_no_path_at_all():
    with pytest.raises(UserError, match=r"source.path is not set; give the folder with the images"):
        read_source(SourceConfig())


def test_folder_without_an_image(tmp_path):
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(UserError) as error:
        read_source(SourceConfig(path=str(tmp_path)))
    assert f"source.path = {tmp_path}: there is no image in it; add some (.bmp .dcm .dicom" in str(error.value)


def test_images_outside_of_class_folders(tmp_path):
    folder_of(tmp_path, ["x/a.jpg", "y/b.jpg", "c.jpg"])
    with pytest.raises(UserError) as error:
        read_source(SourceConfig(path=str(tmp_path)))
    assert f"1 image directly in {tmp_path} (c.jpg), outside of any class folder; move them" in str(error.value)


def test_missing_table(tmp_path):
    folder_of(tmp_path, ABC)
    with pytest.raises(UserError) as error:
        read_source(SourceConfig(path=str(tmp_path), labels="meta.csv"))
    assert f"source.labels = meta.csv: there is no file {tmp_path}/meta.csv; give a CSV or Parquet" in str(error.value)


def test_missing_column_names_the_nearest(tmp_path):
    source = with_table(tmp_path, ABC, GOOD, columns=("image", "labels", "lesion_id"))
    with pytest.raises(UserError) as error:
        read_source(source)
    assert str(error.value) == (
        f"{tmp_path}/labels.csv has no column 'label' (source.label_column); did you mean 'labels'?"
    )
    with pytest.raises(
        UserError, match=re.escape("no column 'lesion' (source.group_column); did you mean 'lesion_id'?")
    ):
        read_source(source.model_copy(update={"label_column": "labels", "group_column": "lesion"}))


def test_a_table_that_is_no_text(tmp_path):
    folder_of(tmp_path, ABC)
    (tmp_path / "labels.csv").write_bytes(b"image,label\n\xff\xfe\x00,x\n")
    with pytest.raises(UserError, match=r"labels.csv is not a CSV in UTF-8 \(.*\); save it as one"):
        read_source(SourceConfig(path=str(tmp_path), labels="labels.csv"))
