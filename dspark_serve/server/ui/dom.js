// Elements of the page, found and made. Text goes in as text, never as markup.

export const byId = (id) => document.getElementById(id);

/** A new element; `children` are elements or text. */
export function make(name, className, ...children) {
  const made = document.createElement(name);
  made.className = className;
  made.append(...children);
  return made;
}
