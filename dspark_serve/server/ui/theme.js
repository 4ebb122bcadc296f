// Light, dark, or as the system says. A script of its own, not a module, so that it runs before the first paint.
"use strict";
(() => {
  const THEMES = ["auto", "light", "dark"];
  const root = document.documentElement;

  const apply = (theme) => {
    root.dataset.theme = theme;
    const name = document.getElementById("theme-name");
    if (name) name.textContent = theme;
  };

  const stored = localStorage.getItem("dspark-theme");
  apply(THEMES.includes(stored) ? stored : "auto");
  document.addEventListener("DOMContentLoaded", () => {
    apply(root.dataset.theme);
    document.getElementById("theme-button").addEventListener("click", () => {
      const next = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
      localStorage.setItem("dspark-theme", next);
      apply(next);
    });
  });
})();
