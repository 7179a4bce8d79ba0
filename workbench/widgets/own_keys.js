// JupyterLab passes over an element with this attribute, and over what is around it, when it looks for a shortcut.
const PASSED_OVER = "data-lm-suppress-shortcuts";

function render() {
  const mark = ({ target }) => target.closest(".workbench-desk") && target.setAttribute(PASSED_OVER, "true");
  document.addEventListener("focusin", mark);
  return () => document.removeEventListener("focusin", mark);
}
export default { render };
