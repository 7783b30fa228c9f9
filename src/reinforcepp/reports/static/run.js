// Held-out prompts can be searched and sorted, and blocks can be copied. Without this script the page shows everything.
(() => {
  "use strict";
  const AT_FIRST = 6;
  const MORE = 24;

  const ORDERS = {
    gain: (a, b) => b.dataset.gain - a.dataset.gain,
    loss: (a, b) => a.dataset.gain - b.dataset.gain,
    judge: (a, b) => a.dataset.judge - b.dataset.judge,
  };
  document.querySelectorAll(".pairs-block").forEach((block) => {
    const [list, more, status] = [".pairs", ".show-more", ".shown"].map((name) => block.querySelector(name));
    const [search, order] = [block.querySelector("input"), block.querySelector("select")];
    const pairs = [...list.children].map((element) => ({ element, text: element.textContent.toLowerCase() }));
    let limit = AT_FIRST;
    const show = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const found = pairs.filter(({ text }) => words.every((word) => text.includes(word)));
      const shown = new Set(found.slice(0, limit));
      pairs.forEach((pair) => (pair.element.hidden = !shown.has(pair)));
      status.textContent = `${shown.size} of ${found.length} shown`;
      more.hidden = shown.size === found.length;
    };
    block.querySelector(".tools").hidden = false;
    search.addEventListener("input", () => ((limit = AT_FIRST), show()));
    more.addEventListener("click", () => ((limit += MORE), show()));
    order.addEventListener("change", () => {
      pairs.sort((a, b) => ORDERS[order.value](a.element, b.element));
      list.append(...pairs.map(({ element }) => element));
      show();
    });
    show();
  });

  document.querySelectorAll("button.copy").forEach((button) => {
    const block = button.parentElement.querySelector("pre");
    const [label] = button.childNodes;
    button.hidden = false;
    button.addEventListener("click", async () => {
      getSelection().selectAllChildren(block); // the fallback if the page can't write to the clipboard
      label.textContent = "Selected";
      setTimeout(() => (label.textContent = "Copy"), 2000);
      try {
        await navigator.clipboard.writeText(block.textContent);
        label.textContent = "Copied";
      } catch {
        // the block stays selected
      }
    });
  });
})();
