"""Draw the pictures of docs/serve.md, the page as a person sees it: python docs/draw_serve.py."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from pages import Person, Server, add_dogs_and_fit, browser_path, draw_scenes, label_faces  # noqa: E402

SIZE = {"width": 1280, "height": 800}
# Until colours have changed and pictures have come.
_PAUSE = 2500


def main() -> None:
    """Make a detector of two classes, and write what is seen on the way."""
    with TemporaryDirectory() as place, sync_playwright() as playwright:
        truth = draw_scenes(Path(place) / "scenes", 24)
        server = Server(Path(place) / "scenes").start()
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        person = Person(browser.new_page(viewport=SIZE), server.url).open("label")
        person.photo_shown()
        label_faces(person, truth, "cat", 6)
        shoot(person.page, "serve-label")
        add_dogs_and_fit(person, truth)
        shoot(person.page, "serve-results")
        browser.close()
        server.stop()


def shoot(page: Page, name: str) -> None:
    """Write what is seen."""
    page.wait_for_timeout(_PAUSE)
    page.screenshot(path=HERE / f"{name}.jpg", type="jpeg", quality=80)


if __name__ == "__main__":
    main()
