//! A headless Chromium, controlled over its debugging pipe: JSON messages that end in a zero byte.

use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{PATIENCE, Process, skip, wait_for};

/// One browser with one page.
pub struct Browser {
    process: Process,
    write: ChildStdin,
    messages: Receiver<Value>,
    session: String,
    next: u64,
    /// Complaints of the page: exceptions, and violations of its security policy.
    pub complaints: Vec<Value>,
    _profile: TempDir,
}

impl Browser {
    /// The browser of all tests that run at this time: starting one takes longer than any test.
    /// `None`, after a notice, where there is no Chromium.
    pub fn shared() -> Option<Arc<Mutex<Browser>>> {
        static SHARED: Mutex<Weak<Mutex<Browser>>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(browser) = shared.upgrade() {
            return Some(browser);
        }
        let browser = Arc::new(Mutex::new(Browser::start()?));
        *shared = Arc::downgrade(&browser);
        Some(browser)
    }

    /// The browser for one test, without state of earlier tests.
    pub fn take(shared: &Mutex<Browser>) -> MutexGuard<'_, Browser> {
        let mut browser = shared.lock().unwrap_or_else(PoisonError::into_inner);
        browser.call("Page.navigate", json!({ "url": "about:blank" }));
        browser.wait_true("location.href === 'about:blank'");
        browser.complaints.clear();
        browser.screen(1280, 800, "light", "no-preference");
        browser
    }

    fn start() -> Option<Browser> {
        if Command::new("chromium").arg("--version").output().is_err() {
            skip("needs chromium");
            return None;
        }
        let profile = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        // The browser reads from descriptor 3 and writes to 4.
        command.args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 </dev/null >/dev/null", "chromium"]);
        command.args(["--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu"]);
        command.args([
            "--hide-scrollbars",
            "--disable-dev-shm-usage",
            "--disable-extensions",
            "--lang=en-US",
        ]);
        // The sandbox does not work for root; the page is trusted.
        command.arg("--no-sandbox");
        command.arg(format!("--user-data-dir={}", profile.path().display()));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = Process::start("chromium", &mut command);
        let write = process.child.stdin.take().unwrap();
        let mut read = BufReader::new(process.child.stdout.take().unwrap());
        let (sender, messages) = channel();
        std::thread::spawn(move || {
            let mut message = Vec::new();
            while read.read_until(0, &mut message).is_ok_and(|count| count > 0) {
                message.pop();
                let Ok(value) = serde_json::from_slice(&message) else { return };
                if sender.send(value).is_err() {
                    return;
                }
                message.clear();
            }
        });
        let (session, complaints) = (String::new(), Vec::new());
        let mut browser =
            Browser { process, write, messages, session, next: 0, complaints, _profile: profile };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = browser.call("Target.attachToTarget", attach);
        browser.session = attached["sessionId"].as_str().unwrap().to_owned();
        for domain in ["Runtime", "Log", "Page", "Accessibility"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        // Shortens a second of the page, so that the tests take less time.
        let faster = json!({ "source": "{ const slow = globalThis.setTimeout;
            globalThis.setTimeout = (then, wait, ...rest) => slow(then, wait / 10, ...rest); }" });
        browser.call("Page.addScriptToEvaluateOnNewDocument", faster);
        Some(browser)
    }

    /// Sends one command and returns its result.
    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.next += 1;
        let id = self.next;
        let mut message = json!({ "id": id, "method": method, "params": parameters });
        if !self.session.is_empty() {
            message["sessionId"] = json!(self.session);
        }
        let mut bytes = serde_json::to_vec(&message).unwrap();
        bytes.push(0);
        self.write.write_all(&bytes).unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut message = self.messages.recv_timeout(left).expect(method);
            if message["id"] == json!(id) {
                assert!(message.get("error").is_none(), "{method}: {message}");
                return message["result"].take();
            }
            let entry = &message["params"]["entry"];
            let complaint = match message["method"].as_str() {
                Some("Runtime.exceptionThrown") => true,
                // An absent server is a network error, and some tests cause it.
                Some("Log.entryAdded") => entry["level"] == "error" && entry["source"] != "network",
                _ => false,
            };
            if complaint {
                self.complaints.push(message);
            }
        }
    }

    /// Opens a page and waits until it is loaded.
    pub fn open(&mut self, url: &str) {
        self.call("Page.navigate", json!({ "url": url }));
        self.wait_true("document.readyState === 'complete' && location.href !== 'about:blank'");
    }

    /// The value of an expression, awaited.
    pub fn value(&mut self, expression: &str) -> Value {
        let parameters =
            json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let mut result = self.call("Runtime.evaluate", parameters);
        assert!(result.get("exceptionDetails").is_none(), "{expression}: {result}");
        result["result"]["value"].take()
    }

    pub fn text(&mut self, expression: &str) -> String {
        let value = self.value(expression);
        value.as_str().unwrap_or_else(|| panic!("{expression}: {value}")).to_owned()
    }

    pub fn wait_true(&mut self, expression: &str) {
        wait_for(expression, || (self.value(expression) == true).then_some(()));
    }

    /// Sets the screen size and the preferences `prefers-color-scheme` and
    /// `prefers-reduced-motion`.
    pub fn screen(&mut self, width: u32, height: u32, scheme: &str, motion: &str) {
        let size =
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", size);
        let features = json!({ "features": [
            { "name": "prefers-color-scheme", "value": scheme },
            { "name": "prefers-reduced-motion", "value": motion },
        ] });
        self.call("Emulation.setEmulatedMedia", features);
    }

    pub fn press(&mut self, key: &str) {
        for kind in ["rawKeyDown", "keyUp"] {
            let code = match key {
                "Tab" => 9,
                "Enter" => 13,
                _ => panic!("{key}"),
            };
            let event = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code,
                "text": if key == "Enter" && kind == "rawKeyDown" { "\r" } else { "" } });
            let kind = if key == "Enter" && kind == "rawKeyDown" { "keyDown" } else { kind };
            let mut event = event;
            event["type"] = json!(kind);
            self.call("Input.dispatchKeyEvent", event);
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The browser ends with all its processes when asked to; when it is killed, they end a
        // moment later.
        let _ = self.write.write_all(b"{\"id\":0,\"method\":\"Browser.close\"}\0");
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.process.running() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
