"""The page as people meet it: in Chromium, on the real server."""

import csv
import errno
import io
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pages import (
    NARROW,
    SCREENS,
    WIDE,
    Person,
    Server,
    add_dogs_and_fit,
    boxes_kept,
    browser_path,
    draw_scenes,
    label_faces,
    open_with_all_found,
    photos_of,
    wait_for_results,
    wait_until_read,
)
from serving import serving as within
from sppnet.datasets import read_dataset
from sppnet.serve.labels import Labels

COUNT = 16


@pytest.fixture(scope="module")
def browser():
    path = browser_path()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """The folder of the photos, and the faces on them."""
    folder = tmp_path_factory.mktemp("page") / "scenes"
    return folder, draw_scenes(folder, COUNT)


@pytest.fixture
def serving():
    """Return a function that starts a server, which is stopped when nobody looks at its page any more."""
    servers = []

    def serving(folder, *options):
        servers.append(Server(folder, *options).start())
        return servers[-1]

    yield serving
    for server in servers:
        server.stop()


@pytest.fixture
def server(serving, scenes, tmp_path):
    """A server of a new project over the scenes."""
    return serving(scenes[0], "--project", str(tmp_path / "project"))


@pytest.fixture(scope="module")
def fitted(scenes, tmp_path_factory, browser):
    """A server on which somebody made a detector of two classes already, by the page."""
    folder, truth = scenes
    server = Server(folder, "--project", str(tmp_path_factory.mktemp("fitted") / "project")).start()
    context = browser.new_context(viewport=WIDE)
    person = Person(context.new_page(), server.url).open("label")
    person.photo_shown()
    label_faces(person, truth, "cat", 6)
    add_dogs_and_fit(person, truth)
    context.close()
    yield server
    server.stop()


@pytest.fixture
def visit(browser, serving):
    """Return a function that makes a person at a page; what their console complains of fails the test."""
    contexts, people = [], []

    def visit(server, viewport=WIDE, **options):
        contexts.append(browser.new_context(viewport=viewport, **options))
        people.append(Person(contexts[-1].new_page(), server.url))
        return people[-1]

    yield visit
    for context in contexts:
        context.close()
    assert [trouble for person in people for trouble in person.troubles] == []


def test_the_minute(server, scenes, visit):
    """Draw one box, answer what lights up, press Fit, drag the threshold, take the spreadsheet away."""
    person = visit(server).open()
    person.see('a[title="scene-01.jpg"] img.shown')
    person.see("text=Start labelling").click()
    person.photo_shown()
    assert label_faces(person, scenes[1], "cat", 6) == 6
    person.see('.class .number:text-is("6")')
    person.see("header .fit").click()
    wait_for_results(person)
    shown = int(person.text(".thresholds output"))
    slider = person.see(".thresholds input")
    slider.fill("0.05")
    assert int(person.text(".thresholds output")) >= shown
    slider.fill("0.99")
    assert int(person.text(".thresholds output")) <= shown
    with person.page.expect_response("**/results/thresholds"):
        slider.fill("0.2")
    with person.page.expect_download() as download:
        person.see("text=Spreadsheet").click()
    lines = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text("utf-8-sig"))))
    photos = [line for line in lines if "scene-" in line["image"]]
    assert len(photos) == COUNT
    assert sum(int(line["cat"]) for line in photos) == int(person.text(".thresholds output"))


def test_finds_what_it_was_shown(fitted, scenes, visit):
    person = visit(fitted).open("quality")
    person.see("h1")
    assert "finds" in person.text("h1").lower()
    assert person.page.locator(".classes .card").count() == 2


def test_corrections_are_new_boxes_and_a_new_fit(fitted, visit):
    person = visit(fitted).open("results")
    open_with_all_found(person)
    before = sum(map(len, boxes_kept(person).values()))
    person.see(".found li")
    person.see('.found button[aria-label^="Yes"]').click()
    person.saved()
    assert sum(map(len, boxes_kept(person).values())) == before + 1
    person.page.keyboard.press("Control+z")
    person.saved()
    assert sum(map(len, boxes_kept(person).values())) == before
    person.page.keyboard.press("Control+y")
    person.saved()
    assert sum(map(len, boxes_kept(person).values())) == before + 1
    person.see("header .fit").click()
    wait_for_results(person)
    assert len(json.loads(fitted.get("quality"))["fits"]) == 2
    person.open("quality")
    person.see("text=Fit by fit")


def test_a_dragged_detection_becomes_a_corrected_box(fitted, visit):
    person = visit(fitted).open("results")
    open_with_all_found(person)
    person.page.keyboard.press("j")
    person.see(".item.found.chosen")
    person.page.keyboard.press("Shift+ArrowDown")
    person.page.keyboard.press("Alt+Shift+ArrowUp")
    person.saved()
    assert any(box["origin"] == "corrected" for boxes in boxes_kept(person).values() for box in boxes)


@pytest.mark.parametrize("form", ["coco", "voc", "yolo", "csv"])
def test_exports_read_back(fitted, visit, scenes, tmp_path, form):
    person = visit(fitted).open("export")
    person.see('button:has-text("What was drawn")').click()
    with person.page.expect_download() as download:
        person.see(f'a[href*="format={form}"]').click()
    name = Path(download.value.suggested_filename)
    taken = tmp_path / name
    download.value.save_as(taken)
    kept = {name: boxes for name, boxes in boxes_kept(person).items() if boxes}
    assert count_of(taken, scenes[0]) == sum(map(len, kept.values()))


def count_of(file, photos):
    """Return how many boxes our own reader finds in what was exported, laid beside the photos."""
    folder = file.parent / "read"
    shutil.copytree(photos, folder / "images")
    if file.suffix == ".zip":
        shutil.unpack_archive(file, folder)
    else:
        shutil.copy(file, folder)
    return sum(len(sample.target.boxes) for sample in read_dataset(folder))


def test_keys_alone(server, scenes, visit):
    """The whole way without a mouse: a box, its name, its place, answers, the fit, the threshold."""
    person = visit(server).open()
    person.see('a[title="scene-01.jpg"]')
    keys = person.page.keyboard
    keys.press("g")
    keys.press("l")
    person.photo_shown()
    keys.press("b")
    person.see(".naming input")
    keys.type("cat")
    keys.press("Enter")
    person.see(".item.box.chosen .chip")
    keys.press("Shift+ArrowRight")
    keys.press("ArrowDown")
    keys.press("Alt+Shift+ArrowRight")
    person.saved()
    (box,) = boxes_kept(person)["scene-01.jpg"]
    middle = (box["box"][0] + box["box"][2]) / 2, (box["box"][1] + box["box"][3]) / 2
    assert middle == pytest.approx((320 + 10 + 5, 240 + 1), abs=1.5)
    for count in range(2, 7):
        person.see(".right .yes")
        keys.press("y")
        wait_for_boxes(person, count)
    keys.press("Escape")
    keys.press("g")
    keys.press("f")
    go_to(person, "button:has-text('Fit'):focus")
    keys.press("Enter")
    wait_for_results(person)
    go_to(person, ".thresholds input:focus")
    before = person.see(".thresholds input").input_value()
    keys.press("ArrowLeft")
    assert person.see(".thresholds input").input_value() != before
    go_to(person, "a.photo:focus")
    keys.press("ArrowRight")
    person.see('[data-cell="1"] a:focus')
    keys.press("Enter")
    person.photo_shown()


def wait_for_boxes(person, count):
    """Wait until so many boxes are kept: each answer is a box of its own."""
    for _ in range(100):
        if sum(map(len, boxes_kept(person).values())) == count:
            break
        person.page.wait_for_timeout(100)
    assert sum(map(len, boxes_kept(person).values())) == count


def go_to(person, selector, most=60):
    """Press Tab until the focus is there."""
    person.page.wait_for_timeout(200)
    for _ in range(most):
        person.page.keyboard.press("Tab")
        if person.page.locator(f"main {selector}").count():
            return
    pytest.fail(f"Tab never came to {selector}")


@pytest.mark.parametrize("look", ["light", "dark", "narrow"])
def test_accessible(fitted, visit, look):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="no axe-playwright-python"
    ).Axe()
    options = {"color_scheme": "dark"} if look == "dark" else {}
    person = visit(fitted, NARROW if look == "narrow" else WIDE, reduced_motion="reduce", **options)
    found = {}
    for screen in SCREENS:
        person.open(screen)
        person.page.wait_for_timeout(300)
        for one in axe.run(person.page).response["violations"]:
            found[f"{screen}: {one['id']}"] = [node["target"] for node in one["nodes"][:3]]
    assert found == {}


@pytest.mark.parametrize("screen", SCREENS)
def test_fits_a_telephone(fitted, visit, screen):
    person = visit(fitted, NARROW, has_touch=True).open(screen)
    person.page.wait_for_timeout(300)
    assert person.page.evaluate("() => document.documentElement.scrollWidth") <= NARROW["width"]
    beyond = """() => [...document.querySelectorAll('main h1, main .button, main .card, main .file')]
        .filter(node => node.offsetParent && node.getBoundingClientRect().right > innerWidth + 1)
        .map(node => node.outerHTML.slice(0, 90))"""
    assert person.page.evaluate(beyond) == []


def test_two_tabs_lose_no_box(server, visit):
    one = visit(server).open("label")
    one.photo_shown()
    other = Person(one.page.context.new_page(), server.url).open("label")
    other.photo_shown()
    one.page.bring_to_front()  # In the background a browser takes its time.
    one.draw([40, 40, 140, 140])
    one.name("cat")
    one.saved()
    other.see(".item.box")
    for person, x in ((one, 200), (other, 300)):
        person.page.bring_to_front()
        person.draw([x, 200, x + 80, 300])
    one.saved()
    other.saved()
    assert len(boxes_kept(one)["scene-01.jpg"]) == 3
    for person in (one, other):
        person.page.wait_for_function("() => document.querySelectorAll('.item.box').length === 3")
    assert other.troubles == [] or all("409" in trouble for trouble in other.troubles)
    one.troubles.clear()


def test_a_killed_server_loses_no_box(server, scenes, visit):
    person = visit(server).open("label")
    person.photo_shown()
    label_faces(person, scenes[1], "cat", 6)
    person.see("header .fit").click()
    person.see(".running")
    server.kill()
    person.page.keyboard.press("g")
    person.page.keyboard.press("l")
    person.photo_shown()
    before = person.page.locator(".item.box").count()
    person.page.keyboard.press("Escape")
    person.draw([10, 10, 90, 90])
    person.see("text=Your boxes are kept here")
    server.start()
    person.page.wait_for_function("() => !document.querySelector('.banner')", timeout=60_000)
    person.saved()
    assert sum(map(len, boxes_kept(person).values())) == 7
    assert person.page.locator(".item.box").count() == before + 1
    person.troubles.clear()


def test_markup_in_names_is_text(serving, tmp_path, visit):
    name = "<img src=x onerror=alert(1)> &amp; <b>cat.jpg"
    folder = tmp_path / "<i>photos"
    draw_scenes(folder, 1)
    (folder / "scene-01.jpg").rename(folder / name)
    person = visit(serving(folder, "--project", str(tmp_path / "project"))).open("label")
    person.photo_shown()
    assert person.text(".bar .title") == name
    person.draw([50, 50, 150, 150])
    person.name("<u>cat</u>")
    person.saved()
    assert person.text(".class .name") == "<u>cat</u>"
    assert person.page.locator("main u, main b, main img[src='x']").count() == 0


def test_an_empty_folder_says_what_to_do_and_takes_photos(serving, tmp_path, scenes, visit):
    (tmp_path / "empty").mkdir()
    person = visit(serving(tmp_path / "empty")).open()
    person.see("text=No photos in this folder")
    dropped = [scenes[0] / f"scene-0{place}.jpg" for place in (1, 2)]
    person.page.locator("input[type=file]").set_input_files(dropped)
    person.see('a[title="scene-02.jpg"] img.shown')
    assert len(photos_of(person)) == 2


def test_ten_thousand_photos_are_a_few_dozen_nodes(server, visit):
    """The list holds what is in sight; a made-up answer stands for the ten thousand."""
    person = visit(server)
    photo = json.loads(server.get("photos?limit=1"))["photos"][0]

    def answer(route):
        query = dict(part.split("=") for part in route.request.url.split("?")[1].split("&"))
        first, count = int(query["offset"]), int(query["limit"])
        photos = [photo | {"name": f"{place:05d}.jpg"} for place in range(first, min(first + count, 10_000))]
        # The same few pictures over and over, each under an id of its own.
        for place, one in enumerate(photos, first):
            one["id"] = f"{photo['id']}?{place}"
        route.fulfill(json={"total": 10_000, "photos": photos})

    person.page.route("**/api/v1/photos?*", answer)
    person.page.route(
        "**/thumbnail",
        lambda route: route.fulfill(
            status=200,
            content_type="image/svg+xml",
            body="<svg xmlns='http://www.w3.org/2000/svg' width='4' height='3'/>",
        ),
    )
    person.open()
    person.see('a[title="00000.jpg"]')
    assert person.page.locator("[data-cell]").count() < 100
    person.page.locator(".scroller").evaluate("node => node.scrollTo(0, node.scrollHeight)")
    person.see('a[title="09999.jpg"]')
    assert person.page.locator("[data-cell]").count() < 100


def test_cancel_keeps_everything(server, scenes, visit):
    person = visit(server).open("label")
    person.photo_shown()
    label_faces(person, scenes[1], "cat", 6)
    person.see("header .fit").click()
    person.see('.running button:has-text("Cancel")').click()
    person.see("text=The last fit was cancelled")
    assert sum(map(len, boxes_kept(person).values())) == 6


def test_zoom_keeps_boxes_where_they_belong(server, visit):
    person = visit(server).open("label")
    person.photo_shown()
    person.page.mouse.move(*person.place(100, 100))
    person.page.mouse.wheel(0, -400)
    person.page.wait_for_timeout(100)
    drawn = [80, 80, 160, 150]
    width = person.page.locator(".stage .photo").bounding_box()["width"]
    person.draw(drawn)
    person.name("cat")
    person.saved()
    person.page.wait_for_timeout(300)
    assert person.page.locator(".stage .photo").bounding_box()["width"] == width
    (box,) = boxes_kept(person)["scene-01.jpg"]
    assert box["box"] == pytest.approx(drawn, abs=1)


def test_draws_by_finger(server, visit):
    """One finger draws; two fingers zoom, and draw nothing."""
    person = visit(server, NARROW, has_touch=True, is_mobile=True).open("label")
    person.photo_shown()
    fingers = person.page.context.new_cdp_session(person.page)

    def touch(kind, *places):
        points = [{"x": x, "y": y, "id": place} for place, (x, y) in enumerate(places)]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    drawn = [200, 150, 420, 330]
    touch("touchStart", person.place(*drawn[:2]))
    touch("touchMove", person.place(300, 250))
    touch("touchMove", person.place(*drawn[2:]))
    touch("touchEnd")
    person.name("cat")
    person.saved()
    width = person.page.locator(".stage .photo").bounding_box()["width"]
    middle = person.place(320, 240)
    for apart in (20, 60, 100):
        ends = [(middle[0] - apart, middle[1]), (middle[0] + apart, middle[1])]
        touch("touchStart" if apart == 20 else "touchMove", *ends)
    touch("touchEnd")
    assert person.page.locator(".stage .photo").bounding_box()["width"] > 2 * width
    (box,) = boxes_kept(person)["scene-01.jpg"]
    assert box["box"] == pytest.approx(drawn, abs=2)


@pytest.mark.long
def test_labelling_goes_on_while_a_fit_runs(server, scenes, visit):
    person = visit(server).open("label")
    person.photo_shown()
    label_faces(person, scenes[1], "cat", 6)
    person.see("header .fit").click()
    person.open("label")
    person.photo_shown()
    before = sum(map(len, boxes_kept(person).values()))
    for step in range(12):
        person.draw([10 + 52 * step, 10, 40 + 52 * step, 40])
    person.saved()
    assert sum(map(len, boxes_kept(person).values())) == before + 12
    person.see("text=The new detector is ready")


def test_a_full_disk_is_told_of_and_no_box_is_lost(scenes, tmp_path, visit, monkeypatch):
    def full(labels, photo, given):
        raise OSError(errno.ENOSPC, "No space left on device")

    with within(scenes[0], tmp_path / "project") as served:
        person = visit(served).open("label")
        person.photo_shown()
        with monkeypatch.context() as patch:
            patch.setattr(Labels, "put", full)
            person.draw([50, 50, 150, 150])
            person.name("cat")
            assert "No space left" in person.text(".banner")
            person.see(".item.box")
            assert sum(map(len, boxes_kept(person).values())) == 0
        person.page.wait_for_function("() => !document.querySelector('.banner')", timeout=60_000)
        person.saved()
        assert sum(map(len, boxes_kept(person).values())) == 1
        person.page.close()
        person.troubles.clear()  # The browser notes every answer that is an error.


def test_a_page_without_its_token_asks_for_it(scenes, serving, tmp_path, visit):
    server = serving(scenes[0], "--project", str(tmp_path / "project"), "--token", "a long secret")
    person = visit(server).open()
    person.see("#token").fill("not that one")
    person.see("button:has-text('Open')").click()
    person.see("#token").fill("a long secret")
    person.see("button:has-text('Open')").click()
    person.see('a[title="scene-01.jpg"] img.shown')
    assert "secret" not in person.page.url
    person.troubles.clear()


def test_a_region_is_looked_for_by_keys(server, visit):
    person = visit(server).open("search")
    person.photo_shown()
    wait_until_read(person)
    boxes = []
    for key in ("b", "ArrowRight", "Shift+ArrowDown", "Alt+Shift+ArrowRight"):
        with person.page.expect_request("**/api/v1/search") as asked:
            person.page.keyboard.press(key)
        boxes.append(np.array(asked.value.post_data_json["box"]))
    assert [(after - before).round(1).tolist() for before, after in pairwise(boxes)] == [
        [1, 0, 1, 0],
        [0, 10, 0, 10],
        [0, 0, 10, 0],
    ]
    person.see(".answer li")


def test_a_photo_far_down_opens_with_its_neighbours(tmp_path, serving, scenes, visit):
    folder = tmp_path / "many"
    folder.mkdir()
    first = (scenes[0] / "scene-01.jpg").read_bytes()
    for number in range(230):
        (folder / f"{number:03d}.jpg").write_bytes(first + bytes([number]))
    person = visit(serving(folder, "--project", str(tmp_path / "project"))).open()
    person.see('a[title="000.jpg"]')
    person.see('[aria-label="Find by name"]').fill("22")
    person.see('a[title="225.jpg"]').click()
    person.photo_shown()
    person.see("text=226 / 230")
    person.page.keyboard.press("d")
    person.see("text=227 / 230")
