"""Logins and topic rights as plugins of amqtt, which loads them by name in the process of the embedded broker."""

from __future__ import annotations

from amqtt.contexts import Action
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin
from amqtt.session import Session

from .credentials import Credentials

__all__ = ["LoginPlugin", "TopicPlugin"]

CREDENTIALS: Credentials | None = None  # of now; set before the plugins are loaded


class LoginPlugin(BaseAuthPlugin):  # type: ignore[misc]  # amqtt ships no types
    """Lets in who knows the password, under the own name only, with a will that the name may publish."""

    async def authenticate(self, *, session: Session) -> bool | None:
        """Check one CONNECT."""
        credentials, username = CREDENTIALS, session.username
        if credentials is None:
            return True
        if username is None or session.client_id != username:
            return False
        if not credentials.check_password(username, session.password):
            return False
        # amqtt publishes wills without asking for rights.
        return not session.will_topic or credentials.allows(username, session.will_topic, write=True)


class TopicPlugin(BaseTopicPlugin):  # type: ignore[misc]
    """Asks `Credentials.allows` for every publish, subscription and delivery."""

    async def topic_filtering(
        self, *, session: Session | None = None, topic: str | None = None, action: Action | None = None
    ) -> bool | None:
        """Check one action."""
        credentials = CREDENTIALS
        if credentials is None or session is None or session.username is None or not topic:
            return False
        if not credentials.knows(session.username):  # Its login ended; its link is being cut.
            return False
        return credentials.allows(session.username, topic, write=action == Action.PUBLISH)
