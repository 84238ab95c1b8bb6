"""Draw the pictures of `docs/serve.md`: the page in Chromium, as a person has it who makes a detector. Run as::

python docs/draw_serve.py
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from pages import Person, Server, browser_path, draw_scenes, label_faces, wait_for_results  # noqa: E402

SIZE = {"width": 1280, "height": 800}
# Until colours have changed and pictures have come.
_PAUSE = 2500


def main() -> None:
    with TemporaryDirectory() as place, sync_playwright() as playwright:
        truth = draw_scenes(Path(place) / "scenes", 24)
        server = Server(Path(place) / "scenes").start()
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        person = Person(browser.new_page(viewport=SIZE), server.url).open("label")
        person.photo_shown()
        label_faces(person, truth, "cat", 6)
        shoot(person.page, "serve-label")
        person.see('button:has-text("Add class")').click()
        person.see('[aria-label="Name of the new class"]').fill("dog")
        person.page.keyboard.press("Enter")
        label_faces(person, truth, "dog", 6)
        person.see("header .fit").click()
        wait_for_results(person)
        shoot(person.page, "serve-results")
        browser.close()
        server.stop()


def shoot(page: Page, name: str) -> None:
    """Write what is seen in few colours, as a small file."""
    page.wait_for_timeout(_PAUSE)
    path = HERE / f"{name}.png"
    page.screenshot(path=path)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
