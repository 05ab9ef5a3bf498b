"""The page's script, whole, under TypeScript's checker: names, nulls and argument types."""

import shutil
import subprocess

import pytest

from regard.look.page import SCRIPTS, STREAMED_SCRIPTS, _read

OPTIONS = (
    "--checkJs --allowJs --noEmit --strict --noImplicitAny false --target es2023 --module esnext "
    "--lib dom,dom.iterable,es2023"
)


@pytest.mark.skipif(not shutil.which("tsc"), reason="tsc (npm install -g typescript) is missing")
@pytest.mark.parametrize("scripts", [SCRIPTS, STREAMED_SCRIPTS], ids=["page", "streamed"])
def test_types_of_the_script(scripts, tmp_path):
    whole = tmp_path / "page.js"
    whole.write_text("\n".join(_read(name) for name in scripts) + "\nexport {};\n", "utf-8")
    told = subprocess.run(
        ["tsc", *OPTIONS.split(), str(whole)], capture_output=True, text=True, check=False
    )
    assert told.stdout == ""
    assert told.returncode == 0
