// JupyterLab passes over an element with this attribute, and over what is around it, when it looks for a shortcut.
const PASSED_OVER = "data-lm-suppress-shortcuts";
const FRAMES = 600; // that a desk may take to come onto the page

function render({ el }) {
  const mark = ({ target }) => target.closest(".workbench-desk") && target.setAttribute(PASSED_OVER, "true");
  document.addEventListener("focusin", mark);
  // A figure drawn before its place is known has plotly's own width: it is told whenever the desk's width changes.
  const observer = new ResizeObserver(() => window.dispatchEvent(new Event("resize")));
  const find = (left) => {
    const desk = el.closest(".workbench-desk");
    if (desk) observer.observe(desk);
    else if (left) requestAnimationFrame(() => find(left - 1));
  };
  find(FRAMES);
  return () => { document.removeEventListener("focusin", mark); observer.disconnect(); };
}
export default { render };
