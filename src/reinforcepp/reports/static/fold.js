// Long texts fold, and their buttons unfold them. Without this script the page shows them unfolded.
(() => {
  "use strict";
  document.querySelectorAll("button.more").forEach((button) => {
    const text = button.previousElementSibling;
    const fold = (folded) => {
      text.classList.toggle("folded", folded);
      button.setAttribute("aria-expanded", String(!folded));
      button.textContent = folded ? "More" : "Less";
    };
    button.hidden = false;
    button.addEventListener("click", () => fold(!text.classList.contains("folded")));
    fold(true);
  });
})();
