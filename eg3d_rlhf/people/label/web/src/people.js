// Access: the list of annotators, new ones, tokens replaced and revoked. A token is on the page only while its dialog is open.

const LOCAL = 'local'; // the user at the server's machine, without a token
const HERE_ALONE = /^(localhost|127\..*|\[::1\])$/; // names by which no other machine reaches the server

export class People {
  // changed(): something was done, the list should be read again
  constructor(page, api, changed) {
    Object.assign(this, { page, api, changed });
    page.add.addEventListener('submit', (event) => this.create(event));
    page.revoke.addEventListener('click', () => this.send('revoke', page.revokeDialog));
    page.replace.addEventListener('click', () => this.send('token', page.replaceDialog));
    page.copyLink.addEventListener('click', () => copy(page.copyLink, page.link));
    page.copy.addEventListener('click', () => copy(page.copy, page.token));
    page.tokenDialog.addEventListener('close', () => this.forget());
  }

  // annotators: as the server lists them; figures: of each by name, of this campaign; me: who is logged in
  show(annotators, figures, me) {
    const { action, person } = document.activeElement?.dataset ?? {};
    const known = annotators.filter((one) => one.name !== LOCAL);
    this.page.people.replaceChildren(...known.map((one) => this.line(one, figures.get(one.name), one.name === me)));
    this.page.nobody.hidden = known.length > 0;
    if (action) this.page.people.querySelector(`[data-action="${action}"][data-person="${CSS.escape(person)}"]`)?.focus();
  }

  line({ name, role, revoked }, figures, own) {
    const line = document.createElement('li');
    const who = document.createElement('div');
    const work = figures ? `${figures.judgements} ${figures.judgements === 1 ? 'answer' : 'answers'}, last ${when(figures.last)}` : 'no answers yet';
    const access = revoked ? `access withdrawn ${when(revoked)}` : '';
    who.append(text('strong', name), text('small', [role, own && 'you', work, access].filter(Boolean).join(' · ')));
    line.append(who, this.button('token', name, revoked ? 'Give access again' : 'New token and link', this.page.replaceDialog, this.page.replaceName));
    if (!revoked && !own) line.append(this.button('revoke', name, 'Revoke', this.page.revokeDialog, this.page.revokeName));
    line.classList.toggle('revoked', Boolean(revoked));
    return line;
  }

  button(action, person, label, dialog, name) {
    const button = text('button', label);
    button.type = 'button';
    Object.assign(button.dataset, { action, person });
    button.setAttribute('aria-label', `${label}: ${person}`);
    button.addEventListener('click', () => {
      this.person = person;
      name.textContent = person;
      dialog.showModal();
    });
    return button;
  }

  async create(event) {
    event.preventDefault();
    const { name, role } = this.page;
    if (await this.ask('', { name: name.value.trim(), role: role.value })) this.page.add.reset();
  }

  send(action, dialog) {
    dialog.close();
    return this.ask(`/${action}`, { name: this.person });
  }

  // Returns whether the server did it; shows the token that it made.
  async ask(path, body) {
    this.page.addError.textContent = '';
    try {
      const reply = await this.api.json('POST', `/api/admin/annotators${path}`, body);
      if (reply.token) this.handOver(reply);
      await this.changed();
      return true;
    } catch (error) {
      this.page.addError.textContent = `${error.message} ${error.remedy}`;
      return false;
    }
  }

  handOver({ name, token, link, qr }) {
    Object.assign(this.page.tokenName, { textContent: name });
    this.page.token.textContent = token;
    this.page.link.textContent = link;
    this.page.qr.src = qr;
    this.page.hereAlone.hidden = !HERE_ALONE.test(location.hostname);
    this.page.copy.textContent = 'Copy token';
    this.page.copyLink.textContent = 'Copy link';
    this.page.tokenDialog.showModal();
  }

  forget() {
    this.page.token.textContent = '';
    this.page.link.textContent = '';
    this.page.qr.removeAttribute('src');
  }
}

async function copy(button, output) {
  try {
    await navigator.clipboard.writeText(output.textContent);
    button.textContent = 'Copied';
  } catch {
    getSelection().selectAllChildren(output);
    button.textContent = 'Press Ctrl+C';
  }
}

function text(tag, content) {
  const element = document.createElement(tag);
  element.textContent = content;
  return element;
}

function when(seconds) {
  return new Date(1000 * seconds).toLocaleString('en-GB', { dateStyle: 'medium', timeStyle: 'short' });
}
