// Keys, the time per unit, and votes without loading a whole page. A vote that can't be sent is sent again until the server
// has it: the server stores the same vote only once.
"use strict";
(() => {
  const RETRY_MILLISECONDS = 2000;
  const problem = document.getElementById("problem");
  let seconds = 0; // during which the unit was visible
  let since = performance.now();
  let busy = false;

  const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

  function count() {
    if (document.visibilityState === "visible") seconds += (performance.now() - since) / 1000;
    since = performance.now();
  }

  async function send(form, submitter) {
    const fields = new URLSearchParams(new FormData(form, submitter));
    for (;;) {
      try {
        const response = await fetch(form.action, { method: "POST", body: fields });
        if (response.status < 500) return response;
        problem.textContent = "The server failed. Trying again …";
      } catch {
        problem.textContent = "Not saved yet: the server can't be reached. Trying again …";
      }
      problem.hidden = false;
      await wait(RETRY_MILLISECONDS);
    }
  }

  async function show(response) {
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    const main = page.querySelector("main");
    if (!main) return location.assign("/");
    problem.hidden = true;
    document.querySelector("main").replaceWith(main);
    seconds = 0;
    since = performance.now();
    begin();
    scrollTo(0, 0);
    document.getElementById("prompt")?.focus({ preventScroll: true }); // Screen readers read the new unit.
  }

  // A page that waits for responses looks for them by itself.
  async function begin() {
    while (document.querySelector("main.waiting")) {
      await wait(RETRY_MILLISECONDS);
      const response = await fetch("/").catch(() => null);
      if (response?.ok) return show(response);
    }
  }

  document.addEventListener("visibilitychange", count);
  document.addEventListener("submit", async (event) => {
    const form = event.target;
    if (!["/vote", "/undo"].includes(new URL(form.action).pathname)) return;
    event.preventDefault();
    if (busy) return;
    busy = true;
    document.body.classList.add("busy");
    count();
    if (form.elements.seconds) form.elements.seconds.value = seconds.toFixed(2);
    event.submitter?.classList.add("chosen");
    await show(await send(form, event.submitter));
    document.body.classList.remove("busy");
    busy = false;
  });

  function nameOf(event) {
    const digit = /^(?:Digit|Numpad)(\d)$/.exec(event.code)?.[1];
    if (digit) return event.shiftKey ? `Shift+${digit}` : digit;
    return event.key.length === 1 ? event.key.toLowerCase() : event.key;
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (event.target.matches("textarea, input:not([type=radio])")) return;
    const name = nameOf(event);
    const button = [...document.querySelectorAll("[data-key]")].find((each) => each.dataset.key === name);
    if (!button) return;
    event.preventDefault();
    button.click();
  });
  begin();
})();
