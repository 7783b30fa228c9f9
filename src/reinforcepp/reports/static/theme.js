// The button that switches between light and dark; the initial theme is the system's. Scripts that draw on a canvas listen to
// "themechange" on the document.
(() => {
  "use strict";
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = document.createElement("button");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => {
    button.textContent = dark() ? "Light theme" : "Dark theme";
    document.dispatchEvent(new Event("themechange"));
  };
  button.type = "button";
  button.className = "theme";
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    show();
  });
  system.addEventListener("change", show);
  document.body.prepend(button);
  show();
})();
