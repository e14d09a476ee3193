//! The looks of the page: widths, colours, motion, keyboard and accessibility tree.

use dispatcher::api::status::{LeavingStatus, RollStatus};

use super::*;

/// Elements that are wider than the screen.
const TOO_WIDE: &str = "[...document.querySelectorAll('body *')].filter((node) => node.checkVisibility()
   && !node.closest('thead, .visually-hidden, .skip, svg, option')
   && (node.getBoundingClientRect().right > innerWidth + 0.5
       || !node.matches('bdi, span, strong, time, a, code, i, input, select') && node.scrollWidth > node.clientWidth + 1))
 .map((node) => node.outerHTML.slice(0, 200))";

#[test]
fn nothing_overflows_between_320_and_2560_pixels() {
    let Some(shared) = Browser::shared() else { return };
    let mut browser = Browser::take(&shared);
    let (_dispatcher, _door) = idle(&mut browser);
    let mut status = crowd(12);
    status.host = "h".repeat(64);
    for worker in &mut status.pools[0].workers {
        worker.name = LONG.to_owned();
        worker.max_connections = u32::MAX;
        worker.load = 10_000_000 - worker.id;
        worker.taken = u64::MAX >> 12;
        worker.revoked = 1_000_000_000;
        worker.weight = 65_535;
        worker.in_flight = 4_096;
        worker.priority = 65_535;
    }
    status.listeners = vec![ListenerStatus {
        name: LONG.to_owned(),
        address: format!("unix:/run/{}", "x".repeat(100)),
        pool: LONG.to_owned(),
        state: "accepting".to_owned(),
        accepted: u64::MAX >> 12,
        ..ListenerStatus::default()
    }];
    status.pools[0].processes = Some(ProcessesStatus {
        generation: u32::MAX,
        restart_needed: true,
        roll: Some(RollStatus {
            generation: u32::MAX,
            state: "progressing".to_owned(),
            reason: Some("x".repeat(300)),
            ..RollStatus::default()
        }),
        leaving_generations: vec![
            LeavingStatus {
                generation: u32::MAX,
                processes: 1024,
                connections: u64::MAX >> 12,
            };
            4
        ],
        ..ProcessesStatus::default()
    });
    pretend(&mut browser, &status);
    browser.wait_true("document.querySelectorAll('#workers > tr').length === 12");
    for width in [
        320, 360, 414, 480, 640, 641, 700, 768, 769, 834, 959, 960, 961, 1024, 1100, 1151, 1152,
        1280, 1600, 1920, 2560,
    ] {
        browser.screen(width, 900, "light", "no-preference");
        assert_eq!(browser.value(TOO_WIDE), json!([]), "{width}");
        assert_eq!(browser.value("document.documentElement.scrollWidth"), width);
    }
    assert_eq!(browser.complaints, [] as [Value; 0]);
}

/// The lowest contrast between text and background, and its place.
const CONTRAST: &str = r"(() => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\d.]+/g).map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let worst = [99, ''];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility() || node.closest('script, style')) continue;
    let behind = node;
    while (behind && /, 0\)$|transparent/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
    const [a, b] = [getComputedStyle(node).color, getComputedStyle(behind || document.body).backgroundColor].map(light);
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < worst[0]) worst = [contrast, node.outerHTML.slice(0, 200)];
  }
  return worst;
})()";

#[test]
fn light_and_dark_on_a_phone_and_without_motion() {
    let Some(shared) = Browser::shared() else { return };
    let mut browser = Browser::take(&shared);
    let (_dispatcher, _door) = idle(&mut browser);
    pretend(&mut browser, &crowd(20));
    browser.wait_true("document.querySelectorAll('#workers > tr').length === 20");
    let mut grounds = Vec::new();
    for scheme in ["light", "dark"] {
        for width in [320, 768, 1440] {
            browser.screen(width, 800, scheme, "no-preference");
            let too_wide = browser.value(
                "[...document.querySelectorAll('body *')].filter((node) => node.checkVisibility()
                   && !node.closest('thead, .visually-hidden, .skip, svg') && node.getBoundingClientRect().right > innerWidth + 0.5)
                 .map((node) => node.outerHTML.slice(0, 200))",
            );
            assert_eq!(too_wide, json!([]), "{scheme} {width}");
            assert_eq!(browser.value("document.documentElement.scrollWidth"), width, "{scheme}");
        }
        let contrast = browser.value(CONTRAST);
        assert!(contrast[0].as_f64().unwrap() >= 4.5, "{scheme}: {contrast}");
        grounds.push(browser.text("getComputedStyle(document.body).backgroundColor"));
    }
    assert_ne!(grounds[0], grounds[1]);
    let moves = "getComputedStyle(document.querySelector('.bar i')).transitionDuration";
    assert_eq!(browser.text(moves), "0.3s");
    browser.screen(320, 800, "dark", "reduce");
    assert_eq!(browser.text(moves), "0s");
    assert_eq!(browser.complaints, [] as [Value; 0]);
}

/// Roles and names in the accessibility tree.
fn tree(browser: &mut Browser) -> Vec<(String, String)> {
    let tree = browser.call("Accessibility.getFullAXTree", json!({}));
    let word = |node: &Value, key: &str| node[key]["value"].as_str().unwrap_or("").to_owned();
    let nodes = tree["nodes"].as_array().unwrap().iter().filter(|node| node["ignored"] == false);
    nodes.map(|node| (word(node, "role"), word(node, "name"))).collect()
}

#[test]
fn keyboard_and_screen_reader() {
    let Some(shared) = Browser::shared() else { return };
    let mut browser = Browser::take(&shared);
    let (_dispatcher, _door) = idle(&mut browser);
    // The page's clock is nearly stopped, so that a slow machine does not matter.
    browser.value("{ let now = performance.now(); performance.now = () => now += 1; }");
    pretend(&mut browser, &crowd(4));
    browser.wait_true("document.querySelectorAll('#workers > tr').length === 4");
    for width in [1280, 320] {
        browser.screen(width, 800, "light", "no-preference");
        let tree = tree(&mut browser);
        let count = |role: &str| tree.iter().filter(|(r, _)| r == role).count();
        let named = |role: &str, name: &str| {
            tree.iter().any(|(r, n)| r == role && (n == name || name.is_empty()))
        };
        for landmark in ["banner", "main", "contentinfo"] {
            assert_eq!(count(landmark), 1, "{width} {landmark}");
        }
        for heading in ["dispatcher", "Connections", "Last faults", "Pools", "Workers"] {
            assert!(named("heading", heading), "{width} {heading}: {tree:?}");
        }
        // The tables stay tables for screen readers in the phone layout.
        assert_eq!(count("table"), 4, "{width}");
        assert_eq!(count("rowheader"), 4 + 1 + 1, "{width}");
        assert_eq!(count("columnheader"), 9 + 8 + 2 + 6, "{width}");
        assert!(named("button", "Pause"), "{width}");
        assert!(named("searchbox", "Show only") && named("combobox", "Order"), "{width}");
        assert!(named("status", ""), "{width}");
    }
    // A new fault is announced. Changed figures are not, and neither is another fault right after
    // it.
    let live = "[...document.querySelectorAll('[aria-live], [role=status], [role=alert]')].map((n) => n.id)";
    assert_eq!(browser.value(live), json!(["alarm", "news"]));
    let news = "document.getElementById('news').textContent";
    browser.wait_true(&format!("{news}.startsWith('New fault: worker gone, web/')"));
    let mut next = crowd(150);
    next.faults.push(FaultStatus { kind: "out_of_resources".to_owned(), ..FaultStatus::default() });
    pretend(&mut browser, &next);
    browser.wait_true("document.getElementById('faults').innerText.includes('out of resources')");
    browser.wait_true("!document.getElementById('all').hidden");
    assert!(browser.text(news).contains("worker gone"));
    let warm = "document.querySelector('[data-worker=\"140\"]').innerText";
    browser.wait_true(&format!("{warm}.includes('warming up, 40 %')"));
    // Every control is reached with Tab in page order and shows its focus.
    let mut seen = Vec::new();
    for _ in 0..7 {
        browser.press("Tab");
        let focus = browser.value(
            "(() => { const node = document.activeElement, style = getComputedStyle(node);
               return [node.id || node.className || node.localName, style.outlineStyle, parseFloat(style.outlineWidth)]; })()",
        );
        assert!(focus[1] != "none" && focus[2].as_f64().unwrap() >= 2.0, "{focus}");
        seen.push(focus[0].as_str().unwrap().to_owned());
    }
    assert_eq!(seen, ["skip", "pause", "faults", "filter", "order", "all", "a"]);
}
