"""What a repository is called, and what its card says then."""

import pytest

from trl_bbkd.errors import HubError
from trl_bbkd.hub.model_card import StudentCard, write_card
from trl_bbkd.hub.push import push_student, stage_student


@pytest.fixture
def output_dir(tmp_path):
    """A finished student with a card, in a folder `student`."""
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    paper = {"title": "A paper", "id": "2511.10643", "citation": "@article{}"}
    write_card(StudentCard("GAD", paper, [], None, name="student", repo_id=str(folder)), folder)
    return folder


@pytest.mark.parametrize("name", ["me/stu dent", "a/b/c", "-x/y"])
def test_a_name_that_cannot_be_is_not_advised_again(output_dir, name):
    with pytest.raises(HubError) as error:
        push_student(output_dir, name)
    text = str(error.value)
    assert "Write the repository like me/student." in text and text.endswith(f"push {output_dir} me/student`.")


def test_the_title_is_that_of_the_repository(output_dir, tmp_path):
    (staged := tmp_path / "staged").mkdir()
    stage_student(output_dir, staged, "other/my_name")
    text = (staged / "README.md").read_text()
    assert "\n# my_name\n" in text and "\nmodel_name: my_name\n" in text and 'student = "other/my_name"' in text


def test_a_title_of_ones_own_stays(output_dir, tmp_path):
    card = output_dir / "README.md"
    card.write_text(card.read_text().replace("\n# student\n", "\n# A student of mine\n"))
    (staged := tmp_path / "staged").mkdir()
    stage_student(output_dir, staged, "other/name")
    assert "\n# A student of mine\n" in (staged / "README.md").read_text()
