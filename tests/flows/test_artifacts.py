"""What Prefect shows of a run."""

import shutil

import pytest
from recorded_run import LLAMA, finished

from flows import artifacts


def test_the_report_is_linked_with_its_figures(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, told = finished(tmp_path, LLAMA), []
    (tmp_path / "params.yaml").write_text("report: {title: Mine}\n")
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda text, key, _: told.append((key, text)))
    artifacts.show_results(workspace, "report")
    ((key, text),) = told
    page = tmp_path / "artifacts" / "report.html"
    assert key == "report" and f"]({page.as_uri()})" in text and "<title>Mine: tiny</title>" in page.read_text()
    assert "| perplexity | " in text and "| size | 8 MB → 7.2 MB (10.0 % less) |" in text and "Verdict: " in text
    shutil.rmtree(workspace.out("ranks"))  # a page that cannot be written ends no run
    artifacts.show_results(workspace, "report")
    assert len(told) == 1
