// Keys, the time per unit, and votes without loading a whole page. A vote that can't be sent is sent again until the server
// has it: the server stores the same vote only once.
"use strict";
(() => {
  const RETRY_MILLISECONDS = 2000;
  const problem = document.getElementById("problem");
  let seconds = 0; // during which the unit was visible
  let since = performance.now();
  let visible = document.visibilityState === "visible";
  let busy = false;
  let raw = false; // whether texts are shown as they are

  // What the labeler filled in survives a browser that is killed: in its storage, under the name of the unit.
  const keyOf = (form) => `reinforcepp label ${form.elements.unit.value}`;

  function stored(action) {
    try {
      return action(localStorage);
    } catch {} // without storage, it lasts while the page is open
  }

  function remember() {
    const form = document.getElementById("vote");
    const fields = form && [...new FormData(form)].filter(([name]) => /^(text|rank|rating)_/.test(name));
    if (form) stored((storage) => storage.setItem(keyOf(form), JSON.stringify(fields)));
  }

  function restore() {
    const form = document.getElementById("vote");
    const fields = form && stored((storage) => JSON.parse(storage.getItem(keyOf(form))));
    for (const [name, value] of fields ?? []) {
      const field = form.elements[name]; // a field, or the radio buttons of a rating
      if (!field || field.value === value) continue;
      field.value = value;
      if (name.startsWith("text")) field.closest("details").open = true;
    }
  }

  const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

  function count() {
    if (visible) seconds += (performance.now() - since) / 1000; // The event comes after the change.
    visible = document.visibilityState === "visible";
    since = performance.now();
  }

  async function send(form, submitter) {
    const fields = new URLSearchParams(new FormData(form, submitter));
    for (;;) {
      try {
        const response = await fetch(form.action, { method: "POST", body: fields });
        const html = await response.text();
        if (response.status < 500) return { html, status: response.status };
        problem.textContent = "The server failed. Trying again …";
      } catch {
        problem.textContent = "Not saved yet: the server can't be reached. Trying again …";
      }
      problem.hidden = false;
      await wait(RETRY_MILLISECONDS);
    }
  }

  function show(html) {
    const page = new DOMParser().parseFromString(html, "text/html");
    const main = page.querySelector("main");
    if (!main) return location.assign("/");
    problem.hidden = true;
    document.querySelector("main").replaceWith(main);
    if (raw && document.getElementById("raw")) document.getElementById("raw").checked = true;
    seconds = 0;
    since = performance.now();
    begin();
    scrollTo(0, 0);
    document.getElementById("prompt")?.focus({ preventScroll: true }); // Screen readers read the new unit.
  }

  // A page that waits for responses looks for them by itself.
  async function begin() {
    restore();
    mark();
    while (document.querySelector("main.waiting")) {
      await wait(RETRY_MILLISECONDS);
      const response = await fetch("/").catch(() => null);
      if (response?.ok) return show(await response.text());
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
    const { html, status } = await send(form, event.submitter);
    if (form.id === "vote" && (status < 400 || status === 409)) stored((storage) => storage.removeItem(keyOf(form)));
    show(html);
    document.body.classList.remove("busy");
    busy = false;
  });

  function nameOf(event) {
    if (event.ctrlKey || event.metaKey) return event.key === "Enter" ? "Control+Enter" : "";
    const digit = /^(?:Digit|Numpad)(\d)$/.exec(event.code)?.[1];
    if (digit) return event.shiftKey ? `Shift+${digit}` : digit;
    return event.key.length === 1 ? event.key.toLowerCase() : event.key;
  }

  // Rates the first criterion without a rating. "Backspace" takes the last rating or rank back.
  function rate(name) {
    const ratings = [...document.querySelectorAll(".rating")];
    const open = ratings.findIndex((each) => !each.querySelector(":checked"));
    if (name === "Backspace") {
      const last = ratings[(open < 0 ? ratings.length : open) - 1]?.querySelector(":checked");
      if (last) last.checked = false;
    } else {
      const chosen = ratings[open]?.querySelector(`[value="${name}"]`);
      if (chosen) chosen.checked = true;
    }
    remember();
    mark();
  }

  function rank(name) {
    const selects = [...document.querySelectorAll(".ranking select")];
    const next = 1 + Math.max(0, ...selects.map((each) => Number(each.value)));
    if (name === "Backspace") selects.filter((each) => Number(each.value) === next - 1).forEach((each) => (each.value = ""));
    else if (!selects[name - 1].value) selects[name - 1].value = next;
    remember();
  }

  function mark() {
    document.querySelector(".rating.next")?.classList.remove("next");
    const open = [...document.querySelectorAll(".rating")].find((each) => !each.querySelector(":checked"));
    open?.classList.add("next");
    open?.scrollIntoView({ block: "nearest" });
  }

  function edit(summary) {
    const details = summary.parentElement;
    document.querySelectorAll("details.edit[open]").forEach((each) => (each.open = each === details));
    details.open = true;
    details.querySelector("textarea").focus();
  }

  function press(name) {
    const task = document.getElementById("vote")?.className;
    if (task === "rate" && /^([1-5]|Backspace)$/.test(name)) return rate(name);
    const ranked = document.querySelectorAll(".ranking select").length;
    if (task === "rank" && (name === "Backspace" || (name >= "1" && name <= String(ranked)))) return rank(name);
    const found = [...document.querySelectorAll("[data-key]")].filter((each) => each.dataset.key === name);
    const target = found.find((each) => each.checkVisibility());
    if (!target) return false; // The browser handles the key.
    if (target.matches("summary")) edit(target);
    else target.click();
  }

  document.addEventListener("keydown", (event) => {
    const name = nameOf(event);
    if (!name || event.altKey || event.repeat) return;
    const writes = event.target.matches("textarea, input:not([type=radio], [type=checkbox]), select");
    if (writes && name === "Escape") return event.target.blur(); // so that the keys of the page work again
    if (writes && name !== "Control+Enter") return;
    // Both texts can be open.
    const save = name === "Control+Enter" && event.target.closest("details.edit")?.querySelector("button");
    if (save) save.click();
    if (save) return event.preventDefault();
    if (event.target.matches("button, a, summary") && ["Enter", " "].includes(name)) return;
    if (press(name) !== false) event.preventDefault();
  });
  document.addEventListener("input", remember);
  document.addEventListener("change", (event) => {
    if (event.target.id === "raw") raw = event.target.checked;
    mark();
  });
  begin();
})();
