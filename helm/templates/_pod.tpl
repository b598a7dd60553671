{{/* What every pod of the chart has: no token, no links, no root. */}}
{{- define "lowbit.podBase" -}}
serviceAccountName: {{ include "lowbit.serviceAccountName" . }}
automountServiceAccountToken: false
# A Service named lowbit would set LOWBIT_PORT=tcp://… in every pod.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* image and security of every container of the chart; the root file system is read-only. */}}
{{- define "lowbit.containerBase" -}}
image: {{ include "lowbit.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end -}}

{{/* Caches of vLLM, torch and the hub follow HOME; torch asks for a user name, which the image may not know. */}}
{{- define "lowbit.homeEnv" -}}
- {name: HOME, value: /cache}
- {name: USER, value: lowbit}
{{- end -}}

{{- define "lowbit.placement" -}}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.gpu.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* resources and GPUs of a container: (dict "resources" … "gpus" … "resourceName" …). */}}
{{- define "lowbit.resources" -}}
requests:
  {{- toYaml .resources.requests | nindent 2 }}
limits:
  {{- toYaml .resources.limits | nindent 2 }}
  {{- if gt (int .gpus) 0 }}
  {{ .resourceName }}: {{ int .gpus }}
  {{- end }}
{{- end -}}

{{- define "lowbit.volumes" -}}
- name: checkpoint
  {{- if .Values.checkpoint.existingClaim }}
  persistentVolumeClaim: {claimName: {{ .Values.checkpoint.existingClaim }}, readOnly: true}
  {{- else if .Values.checkpoint.hub.id }}
  emptyDir: {sizeLimit: {{ add (int .Values.checkpoint.sizeGib) 1 }}Gi}
  {{- else }}
  image:
    reference: {{ .Values.checkpoint.image.reference }}
    pullPolicy: {{ .Values.checkpoint.image.pullPolicy }}
  {{- end }}
- name: tmp
  emptyDir: {sizeLimit: {{ .Values.volumes.tmp }}}
- name: cache
  emptyDir: {sizeLimit: {{ .Values.volumes.cache }}}
- name: shared-memory
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.volumes.sharedMemory }}}
{{- include "lowbit.hubVolume" .Values.checkpoint.hub }}
{{- with include "lowbit.keysSecret" . }}
- name: api-keys
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- with .Values.tls.existingSecret }}
- name: tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* A hub token of the values `hub`: its volume, its mount, and the variable that names the file. */}}
{{- define "lowbit.hubVolume" -}}
{{- with .existingSecret }}
- name: hub-token
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end -}}

{{- define "lowbit.hubMount" -}}
{{- if .existingSecret }}
- {name: hub-token, mountPath: /etc/lowbit/hub, readOnly: true}
{{- end }}
{{- end -}}

{{- define "lowbit.hubEnv" -}}
{{- if .existingSecret }}
- {name: HF_TOKEN_PATH, value: /etc/lowbit/hub/{{ .key }}}
{{- end }}
{{- end -}}

{{- define "lowbit.volumeMounts" -}}
- {name: checkpoint, mountPath: /checkpoint, readOnly: true}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /cache}
- {name: shared-memory, mountPath: /dev/shm}
{{- if include "lowbit.keysSecret" . }}
- {name: api-keys, mountPath: /etc/lowbit/keys, readOnly: true}
{{- end }}
{{- if .Values.tls.existingSecret }}
- {name: tls, mountPath: /etc/lowbit/tls, readOnly: true}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Loading answers /startupz with 503; only then do the other two count. */}}
{{- define "lowbit.probes" -}}
{{- $scheme := include "lowbit.scheme" . -}}
startupProbe:
  httpGet: {path: /startupz, port: http, scheme: {{ $scheme }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (add (include "lowbit.startupBudgetS" . | int) 4) 5 }}
livenessProbe:
  httpGet: {path: /livez, port: http, scheme: {{ $scheme }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: http, scheme: {{ $scheme }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
{{- end -}}
